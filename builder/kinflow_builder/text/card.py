"""card.md of a text family: what it is, what was measured of it, how its branches were trained."""

from __future__ import annotations

from pathlib import Path

from kinflow.text.manifest import TextManifest
from kinflow_builder.card import CARD, percent, table
from kinflow_builder.text.cut import EXITS
from kinflow_builder.text.figures import DEVICE, Figures
from kinflow_builder.text.points import Point, read
from kinflow_builder.text.recipe import HuggingFace, TextRecipe

PLOT = "agreement_over_cost.png"


def write(stage: Path, folder: Path, recipe: TextRecipe, figures: Figures, manifest: TextManifest) -> None:
    """card.md and, where the recipe in `folder` has a sweep, its plot, into the bundle's folder `stage`."""
    parts = [_head(recipe, manifest), _exits(figures, manifest), _splits(manifest), _trained(recipe, figures)]
    points = read(folder)
    if points:
        _draw(stage / PLOT, points, figures, manifest)
        parts.append(_swept(points))
    parts.append(_files(manifest))
    (stage / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _head(recipe: TextRecipe, manifest: TextManifest) -> str:
    return f"""# {manifest.title}

Family `{manifest.id}`, version {manifest.version}, license {manifest.license}. {manifest.layers} decoder layers of
width {manifest.width}, {manifest.vocabulary:,} tokens, sessions of up to {manifest.context:,} positions. Built from
{_source(recipe)}.
The device runs the embedding, the layers up to the split `s1`, a branch of its own and the LM head; the edge goes on to
`s2` and has a branch too; the cloud runs the rest. Layers, embedding and head are the model's own, unchanged; only the
branches were trained."""


def _source(recipe: TextRecipe) -> str:
    source = recipe.model
    if isinstance(source, HuggingFace):
        return f"the folder `{source.directory}`"
    weights = source.weights
    return f"`{weights.file}` in the package `{weights.package}` {weights.version} ({weights.license})"


def _exits(figures: Figures, manifest: TextManifest) -> str:
    rows = []
    whole = _macs(manifest, list(EXITS)[-1])
    for name, exit in figures.exits.items():
        certificate = "keeps nothing early"
        if exit.certificate is not None:
            given = exit.certificate
            certificate = f"{percent(given.kept_share)} at confidence {given.threshold:g} (risk <= {given.epsilon:g})"
        if name == list(EXITS)[-1]:
            certificate = "all"
        rows.append(
            (
                name,
                percent(exit.agreement),
                f"{exit.perplexity:.2f}",
                f"{exit.perplexity / figures.perplexity_float:.3f}",
                f"{_macs(manifest, name) / 1e6:.0f}",
                percent(_macs(manifest, name) / whole),
                certificate,
            )
        )
    columns = (
        "exit",
        "agreement",
        "perplexity",
        "of the largest's alone",
        "million MACs per token",
        "share of the largest's",
        "tokens certified to leave",
    )
    return f"""## Exits

*Agreement*: at {figures.own_tokens:,} positions of the largest member's own greedy answers to {figures.own_source}, the
share where an exit chooses the same token. *Perplexity*: over {figures.written_tokens:,} tokens of
{figures.written_source}; the largest member alone, in floats, has {figures.perplexity_float:.2f}. Exits are measured as
they serve: the device's graphs compute with 8 bits, servers on features coded as `int8`. As floats the device's exit
agrees on {percent(figures.agreement_float)}, and the shortlist that it drafts with chooses the same token as its whole
head at {percent(figures.agreement_shortlist)}. MACs leave out attention over the past. A certificate counts tokens that
leave at an exit and are not the largest member's, as a share of all, surely to 95% as if tokens of one text were
independent.

{table(columns, rows)}"""


def _splits(manifest: TextManifest) -> str:
    rows = [
        (f"`{name}`", str(split.after_layer), ", ".join(f"`{codec}`" for codec in split.codecs))
        for name, split in manifest.splits.items()
    ]
    return f"""## Splits

{table(("split", "after layer", "codecs"), rows)}

A token's features take {manifest.width + 2} bytes as `int8`, {2 * manifest.width} as `f16`. Coding them as `f16` moved
no logit by more than {manifest.margin_bound / 2:g}."""


def _trained(recipe: TextRecipe, figures: Figures) -> str:
    spec, corpus = recipe.training, recipe.corpus
    tokens = corpus.batches * corpus.texts * corpus.tokens
    return f"""## How the branches were trained

Self-distillation, no data: the model wrote {corpus.batches * corpus.texts:,} texts of {corpus.tokens} tokens
({tokens:,} tokens): conversations with itself, whose answers are greedy or sampled at temperature
{corpus.temperature:g}, and free texts from a random word on. Each branch began as a copy of the model's last layers
behind a linear map that least squares found, and learnt in {spec.epochs} passes what the last layer made of the same
texts, from the hidden features at its split, on {figures.trained_on}. Seed {spec.seed}.
`kinflow build --train` does it again."""


def _swept(points: list[Point]) -> str:
    rows = [
        (
            str(point.after_layer),
            str(point.branch_layers),
            percent(point.cost_share),
            percent(point.untrained),
            percent(point.agreement),
        )
        for point in points
    ]
    columns = ("layers below", "branch layers", "cost of a draft", "agreement untrained", "trained briefly")
    return f"""## Where to cut

Branches trained for {points[0].texts} texts each, agreement on held-out texts of the model's own, features as floats.

![agreement over cost]({PLOT})

{table(columns, rows)}"""


def _files(manifest: TextManifest) -> str:
    rows = [
        (f"`{graph.file.path}`", f"{graph.file.bytes / 1e6:.1f}", f"{segment.parameters:,}")
        for segment in manifest.segments.values()
        for graph in segment.graphs.values()
    ]
    return f"""## Files

{table(("graph", "MB", "parameters"), rows)}"""


def _macs(manifest: TextManifest, exit: str) -> int:
    return sum(manifest.segments[name].macs for name in [*EXITS[exit], "head"])


def _draw(path: Path, points: list[Point], figures: Figures, manifest: TextManifest) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=90)
    for count in sorted({point.branch_layers for point in points}):
        some = [point for point in points if point.branch_layers == count]
        label = f"{count} layer{'' if count == 1 else 's'}, briefly trained"
        axes.plot(_costs(some), [100 * point.agreement for point in some], "o-", label=label)
    axes.plot(_costs(points), [100 * point.untrained for point in points], "x", label="untrained")
    share = _macs(manifest, DEVICE) / _macs(manifest, list(EXITS)[-1])
    axes.plot([100 * share], [100 * figures.exits[DEVICE].agreement], "k*", label="this family's device", markersize=10)
    axes.set_xlabel("cost of drafting a token, % of the whole model's")
    axes.set_ylabel("agreement, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _costs(points: list[Point]) -> list[float]:
    return [100 * point.cost_share for point in points]
