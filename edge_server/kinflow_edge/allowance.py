"""How much each client may take: a token bucket for each. Pure; the clock is given."""

from __future__ import annotations

from collections import OrderedDict

# Who has not come for longest is forgotten: strangers must not fill the memory.
MAX_CLIENTS = 4096


class Allowance:
    """`per_s` of anything for each client, and as much at once as in `burst_s`."""

    def __init__(self, per_s: float, burst_s: float = 1.0) -> None:
        self._per_s = per_s
        self._burst = per_s * burst_s
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, amount: float, now_s: float) -> float:
        """0 when `client` may have `amount` now, and it is taken; else the seconds until it may.

        What is more than a whole burst is granted to a client that has taken nothing for a burst's time.
        """
        left, then_s = self._clients.pop(client, (self._burst, now_s))
        left = min(self._burst, left + (now_s - then_s) * self._per_s)
        wanted = min(amount, self._burst)
        granted = left >= wanted
        self._clients[client] = (left - amount if granted else left, now_s)
        if len(self._clients) > MAX_CLIENTS:
            self._clients.popitem(last=False)
        return 0.0 if granted else (wanted - left) / self._per_s
