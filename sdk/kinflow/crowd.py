"""Which of many announced brokers get a link, so that a crowd of false ones cannot keep a device from a real one.

Anybody may announce; only who belongs can be connected to. Pure: the clock comes in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kinflow.address import BrokerAddress


class Crowd:
    """Chooses at most `most`. While there are more than that, who does not work within `trial_s` makes room."""

    def __init__(self, most: int, trials: int, trial_s: float) -> None:
        """`trials`: so many of the places are never held by those that have worked."""
        self._most = most
        self._kept = most - trials
        self._trial_s = trial_s
        self._proven: set[BrokerAddress] = set()
        """They have worked since they were announced."""
        self._since_s: dict[BrokerAddress, float] = {}
        """On trial, and from when on."""
        self._failed_s: dict[BrokerAddress, float] = {}

    def choose(
        self, announced: Sequence[BrokerAddress], working: Collection[BrokerAddress], now_s: float
    ) -> list[BrokerAddress]:
        """Of `announced`, the preferred one first: those that get a link now. `working`: those whose link works."""
        self._judge(announced, working, now_s)
        proven = [address for address in announced if address in self._proven]
        kept = sorted(proven, key=lambda address: address not in working)[: self._kept]
        # Whoever is on trial stays until it ends; then comes who was never tried, and who failed longest ago.
        others = [address for address in announced if address not in kept]
        others.sort(key=lambda address: (address not in self._since_s, self._failed_s.get(address, 0.0)))
        chosen = kept + others[: self._most - len(kept)]
        for address in chosen:
            if address not in self._proven:
                self._since_s.setdefault(address, now_s)
        self._since_s = {address: since_s for address, since_s in self._since_s.items() if address in chosen}
        return chosen

    def gave_way(self, address: BrokerAddress) -> bool:
        """It was tried in vain: nothing can be under way on its link."""
        return address in self._failed_s

    def _judge(self, announced: Sequence[BrokerAddress], working: Collection[BrokerAddress], now_s: float) -> None:
        present = set(announced)
        self._proven = (self._proven | set(working)) & present
        for address, since_s in list(self._since_s.items()):
            if address in self._proven or address not in present:
                del self._since_s[address]
            elif now_s - since_s > self._trial_s:
                del self._since_s[address]
                self._failed_s[address] = now_s
        self._failed_s = {
            address: failed_s
            for address, failed_s in self._failed_s.items()
            if address in present and address not in self._proven
        }
