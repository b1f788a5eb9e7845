"""The card's pictures: accuracy over bytes sent and over latency, with the baselines in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinflow_builder import latency
from kinflow_builder.bdrate import front
from kinflow_builder.figures import Figures

BYTES_PLOT = "accuracy_over_bytes.png"
LATENCY_PLOT = "accuracy_over_latency.png"
STYLES = {"JPEG": "s--", "WEBP": "^--"}


def draw(folder: Path, found: Figures) -> None:
    """Both as small PNG files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=90)
    _over_bytes(axes, found)
    _save(figure, folder / BYTES_PLOT)
    figure, panels = pyplot.subplots(1, len(latency.LINKS), figsize=(9, 3.4), dpi=90, sharey=True)
    for axes, link in zip(panels, latency.LINKS, strict=True):
        _over_latency(axes, found, link)
    panels[0].set_ylabel("top-1, %")
    panels[0].legend(fontsize=6)
    _save(figure, folder / LATENCY_PLOT)


def _over_bytes(axes: Any, found: Figures) -> None:
    _line(axes, [(s.bytes_mean, s.top1) for s in found.sweep], "o-", "family, thresholds swept")
    _line(axes, [(p.bytes_mean, p.top1) for p in found.features], "D-", "all features to the largest member")
    for kind, points in found.files.items():
        _line(axes, [(p.bytes_mean, p.top1) for p in front(points)], STYLES[kind], f"{kind} to the largest member")
    _line(axes, [(found.curve_cascade.bytes_mean, found.curve_cascade.top1)], "k*", "certified thresholds")
    axes.set_xlabel("bytes sent per image, mean")
    axes.set_ylabel("top-1, %")
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    _zoom(axes, found)
    axes.legend(fontsize=7)


def _over_latency(axes: Any, found: Figures, link: latency.Link) -> None:
    times, runs = found.times, found.runs
    family = [(1e3 * latency.of_family(times, runs, service, link), service.top1) for service in found.sweep]
    _line(axes, family, "o-", "family, thresholds swept")
    _line(axes, [(1e3 * times.member_s[runs[0].member], found.sweep[0].top1)], "v", "device only")
    for kind, points in found.files.items():
        line = [(1e3 * latency.of_images(times, point, kind, link), point.top1) for point in front(points)]
        _line(axes, line, STYLES[kind], f"cloud only, {kind}")
    certified = 1e3 * latency.of_family(times, runs, found.curve_cascade, link)
    _line(axes, [(certified, found.curve_cascade.top1)], "k*", "certified thresholds")
    axes.set_title(link.text, fontsize=7)
    axes.set_xlabel("mean ms per image")
    axes.set_xscale("log")
    _zoom(axes, found)


def _line(axes: Any, points: list[tuple[float, float]], style: str, label: str) -> None:
    axes.plot([x for x, _ in points], [100 * top1 for _, top1 in points], style, label=label, markersize=5)


def _zoom(axes: Any, found: Figures) -> None:
    """What files of the poorest quality give is far below; the picture is about the rest."""
    values = [service.top1 for service in found.sweep] + [point.top1 for point in found.features]
    room = max(0.02, max(values) - min(values))
    axes.set_ylim(100 * (min(values) - 2 * room), 100 * min(1.0, max(values) + room / 2))
    axes.grid(alpha=0.3)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
