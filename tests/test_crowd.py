"""Which of many announced brokers get a link: a device and its real servers in a crowd of false ones."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kinflow.address import BrokerAddress
from kinflow.crowd import Crowd

MOST, TRIALS, TRIAL_S = 6, 2, 3.0
STEP_S = 0.25
CONNECT_S = 0.5


def addresses(count: int, net: int = 0) -> list[BrokerAddress]:
    return [BrokerAddress(f"192.0.{net}.{number}", 1883) for number in range(count)]


class Lan:
    """Steps through time: a real broker works so long after it got its link, a false one never."""

    def __init__(self, real: list[BrokerAddress]) -> None:
        self.crowd = Crowd(MOST, TRIALS, TRIAL_S)
        self.real = set(real)
        self.now_s = 0.0
        self.linked_s: dict[BrokerAddress, float] = {}
        self.most_links = 0

    @property
    def working(self) -> set[BrokerAddress]:
        return {a for a, since_s in self.linked_s.items() if a in self.real and self.now_s - since_s >= CONNECT_S}

    def step(self, announced: list[BrokerAddress]) -> None:
        self.now_s += STEP_S
        chosen = self.crowd.choose(announced, self.working, self.now_s)
        assert len(chosen) == len(set(chosen)) == min(MOST, len(announced))
        self.linked_s = {address: self.linked_s.get(address, self.now_s) for address in chosen}

    def until(self, condition: Callable[[], bool], announced: list[BrokerAddress], within_s: float) -> None:
        end_s = self.now_s + within_s
        while not condition():
            assert self.now_s < end_s
            self.step(announced)


def test_all_are_linked_while_they_fit() -> None:
    """As many as there are places, working or not."""
    lan, announced = Lan([]), addresses(MOST)
    for _ in range(100):
        lan.step(announced)
    assert set(lan.linked_s) == set(announced)


@pytest.mark.parametrize("seed", range(5))
def test_a_real_server_is_found_in_a_crowd_and_kept(seed: int) -> None:
    """Among 250 false ones, wherever it stands in the order; and new false ones do not push it out."""
    (real,) = addresses(1, net=1)
    lan, false = Lan([real]), addresses(250)
    announced = [*false, real]
    random.Random(seed).shuffle(announced)
    lan.until(lambda: real in lan.working, announced, within_s=(250 / MOST + 2) * (TRIAL_S + STEP_S))
    for wave in range(2, 20):
        announced = [*addresses(250, net=wave), real]
        for _ in range(20):
            lan.step(announced)
            assert real in lan.working


def test_the_crowd_goes_round() -> None:
    """Whoever failed is tried again when the others have been: a server that starts later is found too."""
    announced = addresses(30)
    lan = Lan([])
    for _ in range(200):
        lan.step(announced)
    lan.real.add(announced[17])
    lan.until(lambda: announced[17] in lan.working, announced, within_s=(30 / MOST + 2) * (TRIAL_S + STEP_S))


def test_preferred_ones_get_in_though_all_places_work() -> None:
    """The order decides among those that work: a nearer server that comes later is not kept out."""
    announced = addresses(MOST, net=1)
    nearer = addresses(1)
    lan = Lan([*announced, *nearer])
    lan.until(lambda: len(lan.working) == MOST, announced, 5)
    lan.until(lambda: nearer[0] in lan.working, [*nearer, *announced], 5)
    for _ in range(50):
        lan.step([*nearer, *announced])
    assert lan.working == {*nearer, *announced[:-1]}


def test_one_that_worked_and_is_away_keeps_its_place() -> None:
    """A server that is restarted is not lost in the crowd."""
    (real,) = addresses(1, net=1)
    lan, announced = Lan([real]), [*addresses(100), real]
    lan.until(lambda: real in lan.working, announced, 100)
    lan.real.clear()
    for _ in range(100):
        lan.step(announced)
        assert real in lan.linked_s


def test_only_what_never_worked_gives_way_at_once() -> None:
    """On a link that has worked a reply may still be under way."""
    (real,) = addresses(1, net=1)
    lan, announced = Lan([real]), [real, *addresses(20)]
    for _ in range(40):
        lan.step(announced)
    assert not lan.crowd.gave_way(real)
    assert any(lan.crowd.gave_way(address) for address in announced)
