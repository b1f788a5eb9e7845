"""What a stitched member is made of: the transform of the features, the adapter, and its distillation."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")

from torch import nn
from torch.nn import functional

from kinflow_builder import transform
from kinflow_builder.adapter import Adapter, fit_linear, unexplained
from kinflow_builder.distil import Lesson, Pace, distil, divergence
from kinflow_builder.stitch import Continued, combined

pytestmark = pytest.mark.builder


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_transform_with_all_channels_loses_nothing() -> None:
    """Projection and restoration undo each other when no direction is dropped and nothing is rounded."""
    hidden = functional.avg_pool2d(noise(20, 3, 10, 10), 3, 1) + torch.tensor([1.0, -2.0, 0.0]).view(1, 3, 1, 1)
    found = transform.fit(hidden, torch.eye(12), 12, 2)
    with torch.no_grad():
        back = found.restore()(found.bottleneck(1.0)(hidden))
    assert torch.allclose(back, hidden, atol=1e-3)


def test_directions_that_count_are_kept() -> None:
    """A channel that the answer ignores goes first, though it varies most."""
    hidden = noise(50, 2, 4, 4)
    hidden[:, 0] *= 2
    tail = nn.Sequential(nn.Flatten(), nn.Linear(32, 5))
    with torch.no_grad():
        tail[1].weight[:, :16] = 0
    metric = transform.fisher(tail, hidden, 2, seed=0)
    assert float(metric.trace()) == pytest.approx(8, rel=1e-3)
    missed = []
    for chosen in (metric, torch.eye(8)):
        found = transform.fit(hidden, chosen, 4, 2)
        with torch.no_grad():
            back = found.restore()(found.bottleneck(1.0)(hidden))
        missed.append((back - hidden).square().mean((0, 2, 3))[1])
    assert missed[0] < 0.5 < 0.9 < missed[1]


def test_the_step_meets_the_budget() -> None:
    """Entropy at the step that is found is the budget, to within a hundredth, and grows with finer steps."""
    features = noise(40, 6, 5, 5)
    step = transform.step_for(features, 40.0)
    size = transform.entropy_bytes(features, step)
    assert 39.6 < size <= 40
    assert transform.entropy_bytes(features, step / 2) > size


def test_a_step_is_never_so_fine_that_features_are_cut_off() -> None:
    """Few large values among many small ones: two steps meet the budget, and the one that clips is not taken."""
    features = noise(40, 6, 5, 5) * torch.where(noise(40, 6, 5, 5, seed=1) > 1.5, 30.0, 1.0)
    sizes = [transform.entropy_bytes(features, step) for step in (0.02, 0.3, 8.0)]
    assert sizes[0] < 0.6 * sizes[1] > sizes[2]
    # 45 bytes are reached at a step of about 0.05, where nearly everything is cut off, and at 1, where a twentieth is.
    for budget in (45.0, 8.0):
        step = transform.step_for(features, budget)
        assert (features.abs() > 7.5 * step).float().mean() <= 1.1 * transform.CUT_SHARE
        assert transform.entropy_bytes(features, step) <= budget


def test_least_squares_finds_a_linear_relation() -> None:
    """Where the larger member's hidden values are a 3 x 3 convolution of the smaller one's, it is found."""
    torch.manual_seed(0)
    hidden = functional.avg_pool2d(noise(30, 4, 8, 8), 3, 1, 1)
    relation = nn.Conv2d(4, 7, 3, 1, 1)
    with torch.no_grad():
        wanted = relation(hidden)
    pairs = list(zip(hidden.split(10), wanted.split(10), strict=True))
    adapter = Adapter(4, 7, 1, bent=True)
    before = unexplained(adapter, pairs)
    fit_linear(adapter, pairs)
    assert unexplained(adapter, pairs) < 1e-3 < before


def test_distillation_comes_closer_to_both_models() -> None:
    """A few epochs lower both divergences on features that were not trained on."""
    torch.manual_seed(0)
    small, large = (nn.Sequential(nn.Flatten(), nn.Linear(32, 10)) for _ in range(2))
    hidden = noise(400, 2, 4, 4)
    with torch.no_grad():
        for model in (small, large):
            model[1].weight *= 4
        lesson = Lesson(hidden, small(hidden), large(hidden))
    # The models are right, what was put before them is not.
    member = Continued(nn.ConvTranspose2d(2, 2, 1), small, Adapter(2, 2, 1, bent=True), large, 0.5)

    def apart() -> list[float]:
        with torch.no_grad():
            answers = member.answers(hidden[300:])
        return [
            float(divergence(*pair)) for pair in zip(answers, (lesson.small[300:], lesson.large[300:]), strict=True)
        ]

    before = apart()
    told: list[int] = []
    first = Lesson(hidden[:300], lesson.small[:300], lesson.large[:300])
    distil(member, first, Pace(15, 30, 1e-2, 0), lambda epoch, _: told.append(epoch))
    assert told == list(range(16))
    assert all(now < 0.7 * then for now, then in zip(apart(), before, strict=True))


def test_shares_weigh_the_answers() -> None:
    """A share of 0 is the small member's answer, of 1 the larger one's, and between them both have a say."""
    small, large = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 3.0, 2.5]])
    assert combined(small, large, 0.0).argmax() == 0
    assert combined(small, large, 1.0).argmax() == 1
    middle = combined(small, large, 0.5).softmax(1)
    assert middle[0, 0] < small.softmax(1)[0, 0]
    assert middle[0, 1] > small.softmax(1)[0, 1]
