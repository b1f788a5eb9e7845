"""card.md: what a bundle is and what was measured of it, for people who have only the bundle."""

from __future__ import annotations

from collections.abc import Iterable
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
        _files(manifest),
        _reproduce(recipe),
    ]
    (stage / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _head(manifest: Manifest, recipe: Recipe) -> str:
    return f"""# {manifest.title}

Family `{manifest.id}`, version {manifest.version}, license {manifest.license}.
{len(manifest.labels)} labels: {", ".join(manifest.labels)}.

Images: {recipe.data.source}, license {recipe.data.license}.
It shows and measures the system; it has seen no other pictures than these. Of the training images,
{recipe.data.held_out:,} were kept aside for temperatures and certificates."""


def _members(manifest: Manifest, found: Figures) -> str:
    rows = []
    for name, member in manifest.members.items():
        parts = [manifest.segments[part] for part in member.segments]
        exit = parts[-1].exit or ""
        parameters = sum(part.parameters for part in parts)
        macs = sum(part.macs for part in parts) / 1e6
        top1 = (percent(found.coded[exit]), percent(found.full_precision[exit]))
        rows.append((name, *top1, f"{parameters:,}", f"{macs:.1f}"))
    columns = ("member", "top-1, coded features", "top-1, full precision", "parameters", "million MACs")
    times = ", ".join(f"{seconds * 1e3:.2f} ms on {backend}" for backend, seconds in found.latency_s.items())
    tflite = "".join(f" On TFLite the {exit} exit has {percent(top1)}." for exit, top1 in found.tflite.items())
    return f"""## Members

On the {found.images:,} test images. *Coded*: quantised, coded and decoded at every hop, as in service.
*Full precision*: one machine runs the member and nothing is quantised. Parameters and MACs count
every branch on the way.{tflite}

{_table(columns, rows)}

The smallest member takes {times} (median of one image on one thread of the machine that built this)."""


def _features(manifest: Manifest, found: Figures) -> str:
    rows = []
    for name, split in manifest.splits.items():
        what = f"features at `{name}`, {'x'.join(map(str, split.shape))}"
        rows.append((f"{what}, 4 bits", f"{found.feature_bytes[name]:.0f}"))
        rows.append((f"{what}, 8 bits", f"{found.feature_bytes_q8[name]:.0f}"))
    rows.append(("the image as PNG", f"{found.png_bytes:.0f}"))
    rows.append((f"the image as JPEG, quality {JPEG_QUALITY}", f"{found.jpeg_bytes:.0f}"))
    rows.append(("the image's raw pixels", f"{found.raw_bytes:.0f}"))
    fine = ", ".join(f"{exit} {percent(top1)}" for exit, top1 in found.coded_q8.items())
    return f"""## Features

Mean over the test images.

{_table(("sent", "bytes"), rows)}

Top-1 with 8 bits at every split: {fine}.

![accuracy over bytes]({PLOT})

The family's line sweeps one threshold for all exits. The JPEG line is the largest member on images that
were sent as JPEG, on the first {CURVE_IMAGES:,} test images."""


def _exits(manifest: Manifest, found: Figures) -> str:
    columns = ("exit", "temperature", "threshold", "certificate", "answered here")
    rows = [
        (
            name,
            f"{exit.temperature:.3f}",
            f"{exit.threshold:.3f}",
            _promise(exit.certificate),
            percent(found.cascade.shares[name]),
        )
        for name, exit in manifest.exits.items()
    ]
    return f"""## Exits

The gap is the share of all images whose answer is kept and wrong where the last exit is right. Thresholds
come from Learn then Test (arXiv 2110.01052) with exact binomial p-values. Each certificate holds alone,
for images like those that it was made with.

{_table(columns, rows)}

All tiers together, on the test images: {percent(found.cascade.top1)} right,
{found.cascade.bytes_mean:.1f} bytes sent per image."""


def _promise(certificate: Certificate | None) -> str:
    if certificate is None:
        return "none: keeps every answer"
    epsilon, sure = percent(certificate.epsilon), percent(1 - certificate.delta)
    return f"gap <= {epsilon}, {sure} sure, n = {certificate.n:,}"


def _files(manifest: Manifest) -> str:
    rows = [(file.path, f"{file.bytes / 1e3:.1f}") for file in manifest.files()]
    return f"## Files\n\n{_table(('file', 'kB'), rows)}"


def _reproduce(recipe: Recipe) -> str:
    training = recipe.training
    return f"""## Reproduce

    pip install 'kinflow[builder-tflite]'
    kinflow build families/{recipe.id} --fresh
    kinflow bench accuracy families/{recipe.id} --json

Seed {training.seed}, {training.epochs} epochs, {training.threads} CPU threads. Another processor or another
torch rounds differently: weights then differ, and these figures by some tenths of a point."""


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"
