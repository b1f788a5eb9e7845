"""What a run over labelled images amounts to: the demo's numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kinflow.answer import Answer
from kinflow.family import Family
from kinflow.preprocess import Preprocessor

JPEG_QUALITY = 75
TIERS = ("device", "edge", "cloud")


class TierSummary(msgspec.Struct, frozen=True):
    share: float
    """Share of the answers, 0 to 1."""
    accuracy: float | None
    """Top-1 of this tier's answers, in percent; None when it gave none."""
    p50_ms: float | None
    p95_ms: float | None
    bytes_up_mean: float | None
    """MQTT payload bytes sent up for one answer, over all hops."""


class Summary(msgspec.Struct, frozen=True):
    images: int
    accuracy: float
    accuracy_device_only: float
    accuracy_cloud_only: float
    tiers: dict[str, TierSummary]
    bytes_per_inference: float
    """MQTT payload bytes sent up, over all hops, a mean over all images, those kept on the device included."""
    png_bytes: float
    jpeg_bytes: float
    raw_bytes: float
    degraded: int
    reasons: dict[str, int]
    """Why answers were degraded, and how often."""


def summarise(
    family: Family, answers: Sequence[Answer], images: Sequence[npt.NDArray[np.uint8]], truths: Sequence[int]
) -> Summary:
    """`images` and `truths` (label indices) belong to `answers` one by one; there is at least one."""
    sizes = [_encoded_bytes(image) for image in images]
    reasons: dict[str, int] = {}
    for answer in answers:
        if answer.degraded:
            reasons[answer.reason] = reasons.get(answer.reason, 0) + 1
    return Summary(
        images=len(answers),
        accuracy=_percent([answer.index == truth for answer, truth in zip(answers, truths, strict=True)]),
        accuracy_device_only=_member_accuracy(family, "device", images, truths),
        accuracy_cloud_only=_member_accuracy(family, "cloud", images, truths),
        tiers={tier: _tier(tier, answers, truths) for tier in TIERS},
        bytes_per_inference=float(np.mean([bytes_up(answer) for answer in answers])),
        png_bytes=float(np.mean([png for png, _ in sizes])),
        jpeg_bytes=float(np.mean([jpeg for _, jpeg in sizes])),
        raw_bytes=float(np.mean([image.nbytes for image in images])),
        degraded=sum(answer.degraded for answer in answers),
        reasons=reasons,
    )


def bytes_up(answer: Answer) -> int:
    """MQTT payload bytes sent up for this answer by the device and by every server on the way."""
    return answer.bytes_up + sum(hop.bytes_up for hop in answer.timings.hops)


def table(summary: Summary) -> Any:
    """The summary as a rich renderable."""
    from rich.console import Group
    from rich.table import Table

    tiers = Table(title=f"{summary.images} images", title_justify="left")
    for column in ("tier", "share", "accuracy", "p50 ms", "p95 ms", "bytes up"):
        tiers.add_column(column, justify="left" if column == "tier" else "right")
    for name, tier in summary.tiers.items():
        tiers.add_row(
            name,
            f"{tier.share:.1%}",
            _number(tier.accuracy, "{:.1f} %"),
            _number(tier.p50_ms, "{:.2f}"),
            _number(tier.p95_ms, "{:.2f}"),
            _number(tier.bytes_up_mean, "{:.0f}"),
        )
    totals = Table(show_header=False)
    totals.add_row("accuracy", f"{summary.accuracy:.1f} %")
    totals.add_row("  of the device member alone", f"{summary.accuracy_device_only:.1f} %")
    totals.add_row("  of the cloud member alone", f"{summary.accuracy_cloud_only:.1f} %")
    totals.add_row("bytes up per inference", f"{summary.bytes_per_inference:.0f}")
    totals.add_row("  the images as PNG", f"{summary.png_bytes:.0f}")
    totals.add_row(f"  as JPEG (quality {JPEG_QUALITY})", f"{summary.jpeg_bytes:.0f}")
    totals.add_row("  raw", f"{summary.raw_bytes:.0f}")
    totals.add_row("degraded answers", str(summary.degraded))
    for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1])[:3]:
        totals.add_row(f"  {count} ×", reason)
    return Group(tiers, totals)


def _tier(tier: str, answers: Sequence[Answer], truths: Sequence[int]) -> TierSummary:
    chosen = [(answer, truth) for answer, truth in zip(answers, truths, strict=True) if answer.tier == tier]
    share = len(chosen) / len(answers)
    if not chosen:
        return TierSummary(share, None, None, None, None)
    spent_ms = [answer.total_ms for answer, _ in chosen]
    return TierSummary(
        share=share,
        accuracy=_percent([answer.index == truth for answer, truth in chosen]),
        p50_ms=float(np.percentile(spent_ms, 50)),
        p95_ms=float(np.percentile(spent_ms, 95)),
        bytes_up_mean=float(np.mean([bytes_up(answer) for answer, _ in chosen])),
    )


def _member_accuracy(
    family: Family, name: str, images: Sequence[npt.NDArray[np.uint8]], truths: Sequence[int]
) -> float:
    """Top-1 in percent of one member run from the pixels, nothing quantised on the way."""
    member = family.member(name)
    prepare = Preprocessor(family.preprocess)
    labels = [int(member.run(prepare(image)).logits[0].argmax()) for image in images]
    return _percent([label == truth for label, truth in zip(labels, truths, strict=True)])


def _encoded_bytes(image: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """(PNG, JPEG) sizes of one image."""
    from PIL import Image

    sizes = []
    for kind in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        # PNG ignores the quality.
        Image.fromarray(image).save(buffer, kind, quality=JPEG_QUALITY, optimize=True)
        sizes.append(buffer.tell())
    return sizes[0], sizes[1]


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * float(np.mean(right))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
