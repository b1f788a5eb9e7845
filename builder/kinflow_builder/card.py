"""card.md: what a bundle is and what was measured of it, for people who have only the bundle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kinflow.manifest import Certificate, Exit, Manifest, Precision
from kinflow_builder import latency
from kinflow_builder.bdrate import front
from kinflow_builder.figures import Figures
from kinflow_builder.measure import sources
from kinflow_builder.plot import BYTES_PLOT, LATENCY_PLOT, draw
from kinflow_builder.recipe import FolderData
from kinflow_builder.stitch_recipe import AnyRecipe

CARD = "card.md"
# Where `kinflow certify` writes: what stands below was made after the card, what stands above may no longer hold.
CERTIFIED = "## Certified again"
RISKS = {
    "gap": "kept, wrong, and right at the last exit",
    "consistency": "kept, and another than the last exit's",
}


def write(stage: Path, manifest: Manifest, recipe: AnyRecipe, found: Figures) -> None:
    """card.md and its plots, into the bundle's folder."""
    draw(stage, found)
    parts = [
        _head(manifest, recipe),
        _members(manifest, found),
        _features(manifest, found),
        _baselines(found),
        _latency(found),
        _exits(manifest, found),
        _files(manifest),
        _reproduce(recipe),
    ]
    (stage / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_certified(stage: Path, manifest: Manifest, names: Sequence[str]) -> None:
    """The exits `names` as they are certified now, at the end of the card; nothing where the bundle has no card."""
    path = stage / CARD
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8").partition(f"\n{CERTIFIED}\n")[0].rstrip()
    rows = [_exit_row(name, manifest.exits[name]) for name in names]
    given = [manifest.exits[name].certificate for name in names]
    digests = {certificate.data_sha256 for certificate in given if certificate is not None}
    section = f"""{CERTIFIED}

By `kinflow certify`, after the rest of this card was written. These thresholds are the ones in use; shares, plots
and bytes above were measured with the earlier ones. The certifying pictures have the sha256
{", ".join(f"`{digest}`" for digest in sorted(digests))}.

{table(EXIT_COLUMNS, rows)}"""
    path.write_text(f"{text}\n\n{section}\n", encoding="utf-8")


def _head(manifest: Manifest, recipe: AnyRecipe) -> str:
    labels = ", ".join(manifest.labels[:20]) + (", …" if len(manifest.labels) > 20 else "")
    return f"""# {manifest.title}

Family `{manifest.id}`, version {manifest.version}, license {manifest.license}.
{len(manifest.labels)} labels: {labels}.

Images: {recipe.data.source}, license {recipe.data.license}.
The figures below hold for images like these. Of those to train on, {_held_out(recipe)} were kept aside for
temperatures and certificates."""


def _held_out(recipe: AnyRecipe) -> str:
    kept = recipe.data.held_out
    return f"{kept:,}" if isinstance(kept, int) else f"{100 * kept:g}%"


def _members(manifest: Manifest, found: Figures) -> str:
    rows = []
    begins = sources(manifest)
    for name, member in manifest.members.items():
        parts = [manifest.segments[part] for part in member.segments]
        exit = parts[-1].exit or ""
        parameters = sum(part.parameters for part in parts)
        macs = sum(part.macs for part in parts) / 1e6
        top1 = (percent(found.coded[exit]), percent(found.full_precision[exit]))
        size = sum(part.graphs["onnx"].file.bytes for part in parts if "onnx" in part.graphs) / 1e6
        time = f"{1e3 * found.times.member_s[name]:.2f}"
        rows.append((name, *top1, f"{parameters:,}", f"{size:.2f}", f"{macs:.1f}", f"`{begins[name]}`", time))
    columns = (
        "member",
        "top-1, coded features",
        "top-1, full precision",
        "parameters",
        "MB of ONNX",
        "million MACs",
        "begins at",
        "ms from there",
    )
    times = ", ".join(f"{1e3 * seconds:.2f} ms on {backend}" for backend, seconds in found.times.device_s.items())
    tflite = "".join(f" On TFLite the {exit} exit has {percent(top1)}." for exit, top1 in found.tflite.items())
    return f"""## Members

On the {found.images:,} test images. *Coded*: quantised, coded and decoded at every hop, as in service.
*Full precision*: one machine runs the member and nothing is quantised on the way. Parameters, sizes and MACs count
everything from the input on, every branch on the way too. Times are medians of one image on one thread of the
machine that built this, from where a member begins in service.{tflite}

{table(columns, rows)}

The smallest member takes {times}."""


def _features(manifest: Manifest, found: Figures) -> str:
    rows = []
    for name, split in manifest.splits.items():
        for codec, spec in split.codecs.items():
            where = f"features at `{name}`, {'x'.join(map(str, split.shape))}, codec `{codec}`"
            rows.append((where + (" (default)" if codec == split.default_codec else ""), f"{spec.bytes_mean:.0f}"))
    rows.append(("the image as PNG", f"{found.png_bytes:.0f}"))
    rows.append(("the image's raw pixels", f"{found.raw_bytes:.0f}"))
    coding = ", ".join(
        f"{1e6 * found.times.encode_s[split]:.0f} and {1e6 * found.times.decode_s[split]:.0f} µs at `{split}`"
        for split in found.times.encode_s
    )
    took = f"\n\nEncoding and decoding an item with the default codec take {coding}." if coding else ""
    return f"""## Features

Mean bytes of one image: of a codec on the images that it was fitted for, of the others on {found.curve_images:,} test
images.

{table(("sent", "bytes"), rows)}{took}"""


def _baselines(found: Figures) -> str:
    rows = [(f"features, `{point.codec}`", f"{point.bytes_mean:.0f}", percent(point.top1)) for point in found.features]
    for kind, points in found.files.items():
        rows += [
            (
                f"{kind}, {'lossless' if point.lossless else f'quality {point.quality}'}, {point.height}x{point.width}",
                f"{point.bytes_mean:.0f}",
                percent(point.top1),
            )
            for point in found.files[kind]
            if point in front(points)
        ]
    rates = [
        f"against {kind} {rate.percent:+.1f}% (between top-1 {percent(rate.low)} and {percent(rate.high)})"
        if rate.percent is not None
        else f"against {kind} undefined: the features' best is below its worst"
        for kind, rate in found.bd.items()
    ]
    figure = f"\n\nBD-rate, bytes at equal accuracy: {', '.join(rates)}." if rates else ""
    return f"""## Accuracy over bytes

![accuracy over bytes]({BYTES_PLOT})

Every one of {found.curve_images:,} test images sent to the largest member: as features of the smallest one, or as a
file with its header. Files that another one beats with as few bytes are left out.

{table(("sent", "bytes", "top-1"), rows)}{figure}

The line of swept thresholds is the family in service on the same images, one threshold for all exits; what stays
on the device costs no bytes."""


def _latency(found: Figures) -> str:
    rows = []
    best = {kind: max(front(points), key=lambda point: point.top1) for kind, points in found.files.items()}
    device = found.times.member_s[found.runs[0].member]
    for link in latency.LINKS:
        service = latency.of_family(found.times, found.runs, found.cascade, link)
        files = [f"{1e3 * latency.of_images(found.times, point, kind, link):.1f}" for kind, point in best.items()]
        rows.append((link.text, f"{1e3 * device:.2f}", f"{1e3 * service:.1f}", *files))
    columns = ("the device's link", "device only", "in service", *(f"cloud only, {kind} at its best" for kind in best))
    return f"""## Accuracy over latency

![accuracy over latency]({LATENCY_PLOT})

Mean ms of an answer: compute and coding as measured on the machine that built this, links as stated, no queues.
L = t_device + sum over hops of share x (t_encode + RTT + 8 bytes / bandwidth + t_decode + t_member).
The edge's line to the cloud: {latency.TO_THE_CLOUD.text.partition(", ")[2]}.

{table(columns, rows)}"""


EXIT_COLUMNS = ("exit", "temperature", "threshold", "certificate")


def _exit_row(name: str, exit: Exit) -> tuple[str, ...]:
    return (name, f"{exit.temperature:.3f}", f"{exit.threshold:.3f}", _promise(exit))


def _exits(manifest: Manifest, found: Figures) -> str:
    answered = {run.exit: found.cascade.shares[run.member] for run in found.runs}
    rows = [(*_exit_row(name, exit), percent(answered.get(name, 0.0))) for name, exit in manifest.exits.items()]
    kinds = {exit.certificate.risk for exit in manifest.exits.values() if exit.certificate}
    risks = "; ".join(f"{kind}: {RISKS[kind]}" for kind in sorted(kinds))
    return f"""## Exits

The risk is the share of all images whose answer is a loss ({risks or "none is certified"}). Thresholds
come from Learn then Test (arXiv 2110.01052) with exact binomial p-values. Each certificate holds alone,
for images like those that it was made with: `kinflow certify` makes one for yours.

{table((*EXIT_COLUMNS, "answered here"), rows)}

All tiers together, on the test images: {percent(found.cascade.top1)} right,
{found.cascade.bytes_mean:.1f} bytes sent per image."""


def _promise(exit: Exit) -> str:
    certificate: Certificate | None = exit.certificate
    if certificate is None:
        return "none: keeps every answer" if exit.threshold == 0 else "none"
    epsilon, sure = percent(certificate.epsilon), percent(1 - certificate.delta)
    return f"{certificate.risk} <= {epsilon}, {sure} sure, n = {certificate.n:,}"


STORED: dict[Precision, str] = {
    "float": "32-bit floats",
    "half": "weights in 16 bits, arithmetic in floats",
    "weights8": "weights in 8 bits, arithmetic in floats",
    "weights6": "large weights in 6 bits, arithmetic in floats",
    "int8": "weights and arithmetic in 8 bits",
}


def _files(manifest: Manifest) -> str:
    stored = {
        graph.file.path: STORED[graph.precision] if graph.precision else "not stated"
        for segment in manifest.segments.values()
        for graph in segment.graphs.values()
    }
    rows = [
        (file.path, f"{file.bytes / 1e3:.1f}", stored.get(file.path, "a codec's table")) for file in manifest.files()
    ]
    return f"## Files\n\n{table(('file', 'kB', 'holds'), rows)}"


def _reproduce(recipe: AnyRecipe) -> str:
    training = recipe.training
    folder, where = f"families/{recipe.id}", ""
    if isinstance(recipe.data, FolderData):
        folder, where = "FOLDER", "FOLDER holds the build's recipe.toml. "
    return f"""## Reproduce

    pip install 'kinflow[builder-tflite]'
    kinflow build {folder} --fresh
    kinflow bench accuracy {folder} --json
    kinflow bench codec {folder} --json
    kinflow bench certificate {folder} --json

{where}Seed {training.seed}, {training.epochs} epochs, {training.threads} CPU threads. Another processor or another
torch rounds differently: weights then differ, and these figures by some tenths of a point."""


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"
