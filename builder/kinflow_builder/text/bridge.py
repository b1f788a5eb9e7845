"""Where a branch begins before it is trained: a linear map from its split to the model's last layers, by least squares.

The residual stream turns slowly: one matrix brings hidden values near to what many layers make of them (Yom Din et al.,
"Jump to conclusions", arXiv 2303.09435). So copies of the last layers start in a world that they know.
"""

from __future__ import annotations

import torch

from kinflow_builder.text.llama import Llama, whole
from kinflow_builder.text.shape import Branch, Bridge

# Texts that the map is fitted to.
TEXTS = 96
BATCH = 8
# Ridge, as a share of each channel's variance.
RIDGE = 1e-2
# A text's first tokens are a hundred times as large; they would be all that is fitted.
OUTLIER = 4.0


@torch.inference_mode()  # type: ignore[untyped-decorator]
def begun(llama: Llama, after: int, layers: int, features: list[torch.Tensor]) -> Branch:
    """The model's last `layers` layers behind a map from what its first `after` layers make of texts.

    `features`: float16 [tokens, width] of texts from their beginning.
    """
    last = len(llama.layers) - layers
    device = llama.head.device
    given = torch.stack(features[:TEXTS]).to(device, torch.float32)
    between = llama.part(after, last)
    wanted = torch.cat([whole(between, part)[0] for part in given.split(BATCH)]) if last > after else given
    model = llama.source
    return Branch(model.layers[last:], model.norm, fit(given.flatten(0, 1), wanted.flatten(0, 1)))


def fit(given: torch.Tensor, wanted: torch.Tensor) -> Bridge:
    """The map of [n, width] onto [n, width] with the least square error, outliers left out."""
    usual = _usual(given) & _usual(wanted)
    x, y = given[usual].double(), wanted[usual].double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    square = x.T @ x
    square += RIDGE * torch.diag(square.diagonal())
    weight = torch.linalg.solve(square, x.T @ y).T
    bias = y_mean - weight @ x_mean
    return Bridge(weight.float().cpu().numpy(), bias.float().cpu().numpy())


def _usual(values: torch.Tensor) -> torch.Tensor:
    size = values.norm(dim=1)
    return size < OUTLIER * size.median()
