"""The card's picture: accuracy over bytes sent."""

from __future__ import annotations

from pathlib import Path

from kinflow_builder.figures import Figures


def draw(path: Path, found: Figures) -> None:
    """A small PNG: the family's thresholds swept, its own working point, and JPEG to the largest member."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=90)
    axes.plot(
        [point.bytes_mean for point in found.curve],
        [100 * point.top1 for point in found.curve],
        "o-",
        label="family, thresholds swept",
    )
    axes.plot(
        [found.cascade.bytes_mean],
        [100 * found.cascade.top1],
        "k*",
        markersize=11,
        label="certified thresholds",
    )
    axes.plot(
        [point.bytes_mean for point in found.jpeg_curve],
        [100 * point.top1 for point in found.jpeg_curve],
        "s--",
        label="JPEG to the largest member",
    )
    axes.set_xlabel("bytes sent per image, mean")
    axes.set_ylabel("top-1, %")
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
