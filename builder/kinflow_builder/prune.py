"""Which images an epoch is made of: of those that are learnt well, some stay away, and the others count for them.

"InfoBatch" (Qin et al., arXiv 2303.04947): an image whose last loss is below the mean is left out with a fixed chance,
and weighs more where it stays, so that the expected gradient is that of all images. The last epochs have all of them.
"""

from __future__ import annotations

import torch

# Of the epochs, from their beginning: after them all images take part.
PRUNED = 0.875


class Pruning:
    """The loss that each image had when it was seen last."""

    def __init__(self, count: int, share: float) -> None:
        """`share`: of the images below the mean loss, left out."""
        self.losses = torch.full((count,), torch.inf)
        self._share = share

    def epoch(self, generator: torch.Generator, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Images in the order in which they are seen, int64 [n], and the weight of each image, float32 [count].

        `progress`: share of the epochs that are over. Until each image has been seen once all of them are.
        """
        order = torch.randperm(len(self.losses), generator=generator)
        weights = torch.ones(len(self.losses))
        if self._share == 0 or progress >= PRUNED or not self.losses.isfinite().all():
            return order, weights
        learnt = self.losses < self.losses.mean()
        left_out = learnt & (torch.rand(len(learnt), generator=generator) < self._share)
        weights[learnt] = 1 / (1 - self._share)
        return order[~left_out[order]], weights

    def saw(self, images: torch.Tensor, losses: torch.Tensor) -> None:
        """images int64 [n], losses [n]"""
        self.losses[images] = losses.detach().to(self.losses)
