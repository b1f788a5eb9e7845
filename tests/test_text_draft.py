"""How far to draft: what is learned from verdicts, and when a draft is worth its time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kinflow.text.draft import Acceptance, Line, Moment, Plan, Step


def drafts(plan: Plan, chance: float) -> int:
    """How many drafts, each standing with `chance`, the plan wants."""
    count, tokens, standing = 0, 1.0, 1.0
    while plan.more(count, tokens, standing, chance):
        count, standing = count + 1, standing * chance
        tokens += standing
    return count


def plan(
    way_s: float, *, floor: float = 0.0, most: int = 20, server_s: float = 0.01, position_s: float = 0.005
) -> Plan:
    return Plan(floor, most, way_s, 0.01, server_s, position_s)


def rate(plan: Plan, chance: float, count: int) -> float:
    """Tokens per second with `count` drafts a round."""
    tokens = sum(chance**at for at in range(count + 1))
    return tokens / (plan.way_s + plan.server_s + (1 + count) * (plan.step_s + plan.position_s))


@pytest.mark.parametrize("way_s", [0.001, 0.02, 0.08, 0.3])
@pytest.mark.parametrize("chance", [0.3, 0.55, 0.8, 0.95])
def test_the_number_of_drafts_is_the_fastest(way_s: float, chance: float) -> None:
    """No other number of drafts gives more tokens per second."""
    chosen = drafts(plan(way_s), chance)
    best = max(range(21), key=lambda count: rate(plan(way_s), chance, count))
    assert rate(plan(way_s), chance, chosen) == pytest.approx(rate(plan(way_s), chance, best))


def test_others_that_wait_make_rounds_longer() -> None:
    """Where a verification takes time from others, fewer and longer ones are worth it."""
    alone = plan(0.02)
    assert drafts(dataclasses.replace(alone, others_s=0.2), 0.7) > drafts(alone, 0.7)


def test_floor_and_most() -> None:
    """Drafts that seldom stand are not sent however far the server is; and there is a most."""
    assert drafts(plan(10.0, floor=0.5), 0.4) == 0
    assert drafts(plan(10.0, floor=0.5, most=6), 0.99) == 6
    assert drafts(plan(10.0, most=0), 0.99) == 0


def moment(in_flight: int, unsent: int, fresh: list[float], chance: float, sent: float = 1.0) -> Moment:
    return Moment(in_flight, unsent, len(fresh), sent, fresh, lambda: chance)


@pytest.mark.parametrize(
    ("at", "step"),
    [
        (moment(0, 3, [0.97, 0.97], 0.98), "draft"),  # sure: a longer verification costs no more passes
        (moment(0, 3, [0.9, 0.9], 0.0), "send"),  # the text ends, or there are enough
        (moment(1, 2, [0.9, 0.9], 0.02), "send"),  # what is known goes up before a guess
        (moment(1, 0, [], 0.5), "draft"),  # nothing to send: go on meanwhile
        (moment(1, 0, [], 0.02), "wait"),
        (moment(1, 2, [0.3, 0.3], 0.3, sent=0.5), "wait"),  # unlikely drafts stay here
        (moment(3, 2, [0.9, 0.9], 0.0), "wait"),  # the way is full
    ],
)
def test_a_step_fits_the_moment(at: Moment, step: Step) -> None:
    """Sure drafts are collected, doubtful ones are not built upon, and no more is under way than is of use."""
    assert dataclasses.replace(plan(0.02, floor=0.1, server_s=0.01), most=8).step(at) == step


def test_a_longer_way_holds_more() -> None:
    """One verification is computed while the others travel; there is a most."""
    assert [plan(way_s, server_s=0.02).in_flight for way_s in (0.001, 0.05, 10.0)] == [2, 4, 6]


def test_cheap_passes_are_taken_sooner() -> None:
    """A doubtful draft goes up at once where a pass costs less than the waiting it saves."""
    at = moment(1, 1, [0.5], 0.5)
    assert plan(0.02, server_s=0.002).step(at) == "send"
    assert plan(0.02, server_s=0.2).step(at) == "draft"


def test_a_pass_is_dearer_while_another_is_under_way() -> None:
    """The next one would wait for it: drafts go up to an idle server that wait for a busy one's verdict."""
    alike = plan(0.02, server_s=0.01)
    assert alike.step(moment(0, 2, [0.8], 0.9)) == "send"
    assert alike.step(moment(1, 2, [0.8], 0.9)) == "draft"
    assert alike.step(moment(1, 2, [0.5], 0.8)) == "send"
    crowded = dataclasses.replace(alike, queue_s=0.005)  # half a pass: it is never idle
    assert crowded.step(moment(0, 2, [0.8], 0.9)) == "draft"
    assert dataclasses.replace(alike, queue_s=0.0001).step(moment(0, 2, [0.8], 0.9)) == "send"


def test_a_doubtful_draft_goes_up_before_the_exit_speaks() -> None:
    """What the exit would say next could not change it, and takes the exit its time."""
    at = Moment(1, 1, 1, 1.0, [0.5], lambda: pytest.fail("nobody needs to know"))
    assert plan(0.02, server_s=0.002).step(at) == "send"


def test_acceptance_starts_at_the_confidence_and_follows_the_verdicts() -> None:
    """An overconfident exit is believed less after a few dozen rejections, in that bin alone."""
    acceptance = Acceptance()
    assert acceptance.chance(0.85) == pytest.approx(0.85)
    for stood in [True, False] * 40:
        acceptance.saw(0.85, stood)
    assert acceptance.chance(0.85) == pytest.approx(0.5, abs=0.06)
    assert acceptance.chance(0.35) == pytest.approx(0.35)
    assert (acceptance.drafts, acceptance.accepted) == (80, 40)


def test_line_finds_fixed_and_slope() -> None:
    """Times that are fixed + slope x positions, with some noise, are told apart."""
    line, random = Line(), np.random.default_rng(0)
    assert line.fit() == (0.0, 0.0)
    for _ in range(200):
        positions = int(random.integers(1, 10))
        line.saw(positions, 0.02 + 0.003 * positions + random.normal(0, 0.0002))
    fixed, slope = line.fit()
    assert fixed == pytest.approx(0.02, abs=0.003)
    assert slope == pytest.approx(0.003, abs=0.0005)


def test_line_without_variety_is_all_fixed() -> None:
    """Where all verifications had as many positions, nothing is known of the slope; and it is never negative."""
    line = Line()
    for _ in range(5):
        line.saw(4, 0.03)
    assert line.fit() == (pytest.approx(0.03), 0.0)
    falling = Line()
    for positions in (1, 2, 3, 4):
        falling.saw(positions, 0.1 / positions)
    assert falling.fit()[1] == 0.0
