"""Training images made different each time: moved, mirrored, partly blanked."""

from __future__ import annotations

import torch

from kinflow_builder.recipe import Training


def augment(images: torch.Tensor, settings: Training, generator: torch.Generator) -> torch.Tensor:
    """`images` float32 [n, channels, height, width]; what is moved in or erased is as the batch's darkest pixel.

    The square of `erase` pixels is "cutout" (DeVries and Taylor, arXiv 1708.04552). Random numbers come from
    `generator` on the CPU, so that a seed means the same everywhere.
    """
    count, _, height, width = images.shape
    shift, erase = settings.shift, settings.erase
    blank = float(images.min())
    device = images.device

    def draw(high: int) -> torch.Tensor:
        return torch.randint(0, high, (count, 1, 1), generator=generator).to(device)

    row = torch.arange(height, device=device).view(1, -1, 1)
    column = torch.arange(width, device=device).view(1, 1, -1)
    mirrored = torch.where(draw(2) == 1, width - 1 - column, column) if settings.mirror else column
    padded = torch.nn.functional.pad(images, (shift,) * 4, value=blank)
    item = torch.arange(count, device=device).view(-1, 1, 1)
    moved = padded.permute(0, 2, 3, 1)[item, row + draw(2 * shift + 1), mirrored + draw(2 * shift + 1)]
    if erase:
        inside_rows = (row - draw(height)).abs() * 2 < erase
        inside_columns = (column - draw(width)).abs() * 2 < erase
        moved = moved.masked_fill((inside_rows & inside_columns).unsqueeze(-1), blank)
    # The memory is already channels-last: this only renames the axes.
    return moved.permute(0, 3, 1, 2)
