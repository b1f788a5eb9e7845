"""card.md: what a bundle is and what was measured of it, for people who have only the bundle."""

from __future__ import annotations

from pathlib import Path

from kinflow.manifest import Certificate, Manifest
from kinflow_builder.figures import CURVE_IMAGES, JPEG_QUALITY, Figures
from kinflow_builder.plot import draw
from kinflow_builder.recipe import Recipe

CARD = "card.md"
PLOT = "accuracy_over_bytes.png"


def write(stage: Path, manifest: Manifest, recipe: Recipe, found: Figures) -> None:
    """card.md and its plot, into the bundle's folder."""
    draw(stage / PLOT, found)
    parts = [
        _head(manifest, recipe),
        _members(manifest, found),
        _features(manifest, found),
        _exits(manifest, found),
        _files(manifest, found),
        _reproduce(recipe),
    ]
    (stage / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _head(manifest: Manifest, recipe: Recipe) -> str:
    labels = ", ".join(manifest.labels)
    return f"""# {manifest.title}

Family `{manifest.id}`, version {manifest.version}, license {manifest.license}. {len(manifest.labels)} labels: {labels}.

Images: {recipe.data.source}; license {recipe.data.license}. Made for measuring and showing the system, not for
real photos. {recipe.data.held_out} of the training images were kept aside for temperatures and certificates."""


def _members(manifest: Manifest, found: Figures) -> str:
    rows = [
        "| member | top-1, coded features | top-1, full precision | parameters | million MACs |",
        "|---|---|---|---|---|",
    ]
    for name, member in manifest.members.items():
        parts = [manifest.segments[part] for part in member.segments]
        exit = parts[-1].exit or ""
        rows.append(
            f"| {name} | {percent(found.coded[exit])} | {percent(found.full_precision[exit])} "
            f"| {sum(part.parameters for part in parts):,} | {sum(part.macs for part in parts) / 1e6:.1f} |"
        )
    lines = [
        f"## Members\n\nOn the {found.images:,} test images. *Coded*: every hop quantised, coded and decoded, as in",
        "service. *Full precision*: one machine runs the member and nothing is quantised. Parameters and MACs count",
        "every branch on the way.\n",
        *rows,
    ]
    for exit, share in found.tflite.items():
        lines.append(f"\nThe `{exit}` exit on TFLite: {percent(share)}.")
    times = ", ".join(f"{seconds * 1e3:.2f} ms on {backend}" for backend, seconds in found.latency_s.items())
    lines.append(f"\nThe smallest member, one image, one thread of the machine that built this: {times} (median).")
    return "\n".join(lines)


def _features(manifest: Manifest, found: Figures) -> str:
    rows = ["| sent | bytes, mean |", "|---|---|"]
    for split in manifest.splits:
        shape = "x".join(map(str, manifest.splits[split].shape))
        rows.append(f"| features at `{split}` ({shape}), 4 bits | {found.feature_bytes[split]:.0f} |")
        rows.append(f"| features at `{split}` ({shape}), 8 bits | {found.feature_bytes_q8[split]:.0f} |")
    rows += [
        f"| the image as PNG | {found.png_bytes:.0f} |",
        f"| the image as JPEG, quality {JPEG_QUALITY} | {found.jpeg_bytes:.0f} |",
        f"| the image's raw pixels | {found.raw_bytes:.0f} |",
    ]
    fine = ", ".join(f"{exit} {percent(share)}" for exit, share in found.coded_q8.items())
    return "\n".join(
        [
            "## Features\n",
            *rows,
            f"\nTop-1 with 8 bits at every split: {fine}.\n",
            f"![accuracy over bytes]({PLOT})\n",
            f"The line of the family comes from one threshold for all exits, swept; the JPEG line, from {CURVE_IMAGES:,} of",
            "the test images, is the largest member on images that were sent as JPEG.",
        ]
    )


def _exits(manifest: Manifest, found: Figures) -> str:
    rows = ["| exit | temperature | threshold | certificate | answered here |", "|---|---|---|---|---|"]
    for name, exit in manifest.exits.items():
        promise = _promise(exit.certificate)
        share = percent(found.cascade.shares[name])
        rows.append(f"| {name} | {exit.temperature:.3f} | {exit.threshold:.3f} | {promise} | {share} |")
    return "\n".join(
        [
            "## Exits\n",
            "The gap is the share of all images whose answer is kept, wrong, and right at the last exit. Thresholds come",
            "from Learn then Test (arXiv 2110.01052) with exact binomial p-values; each certificate holds alone.\n",
            *rows,
            f"\nAll three tiers together, on the test images: {percent(found.cascade.top1)} right, "
            f"{found.cascade.bytes_mean:.1f} bytes sent per image.",
        ]
    )


def _promise(certificate: Certificate | None) -> str:
    if certificate is None:
        return "none: keeps every answer"
    return f"gap <= {percent(certificate.epsilon)} with probability {1 - certificate.delta:.2f}, n = {certificate.n:,}"


def _files(manifest: Manifest, found: Figures) -> str:
    rows = ["| file | kB |", "|---|---|"]
    rows += [f"| {file.path} | {file.bytes / 1e3:.1f} |" for file in manifest.files()]
    return "\n".join(["## Files\n", *rows])


def _reproduce(recipe: Recipe) -> str:
    return f"""## Reproduce

    pip install 'kinflow[builder-tflite]'
    kinflow build families/{recipe.id}
    kinflow bench accuracy families/{recipe.id} --json

Seed {recipe.training.seed}, {recipe.training.epochs} epochs, {recipe.training.threads} CPU threads. Another processor or
torch rounds differently, so that weights and the second decimal of these figures may move."""


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"
