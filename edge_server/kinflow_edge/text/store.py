"""The sessions that a server holds: bounded in number and memory, forgotten when they idle."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from kinflow.errors import SessionLimit
from kinflow_edge.text.model import ServedText
from kinflow_edge.text.session import Session

Key = tuple[str, str, bytes]
"""Family, client and id: nobody reaches a session by another client's name."""


class Bounds(NamedTuple):
    sessions: int
    per_client: int
    cache_bytes: int
    idle_s: float
    """A session that was not used for so long is forgotten."""
    keep_s: float
    """One that was used within this time does not make room for another."""


class Sessions:
    """Not for several threads at once. What had to be forgotten is returned: the tier above holds it too."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        # The one that was used longest ago first.
        self._sessions: OrderedDict[Key, Session] = OrderedDict()
        self.evicted = 0
        """Sessions that made room for others."""
        self.expired = 0
        """Sessions that idled."""

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def positions(self) -> int:
        return sum(session.length for session in list(self._sessions.values()))

    @property
    def cache_bytes(self) -> int:
        return sum(session.cache_bytes for session in list(self._sessions.values()))

    def get(self, family: str, client: str, id_: bytes, now_s: float) -> Session | None:
        """It counts as used now."""
        session = self._sessions.get((family, client, id_))
        if session is not None:
            self._sessions.move_to_end((family, client, id_))
            session.used_s = now_s
        return session

    def open(
        self, model: ServedText, client: str, id_: bytes, now_s: float, *, bounded: bool = True
    ) -> tuple[Session, list[Session]]:
        """A new one, and those that made room for it. Raises SessionLimit, unless it is the server's own."""
        gone = []
        own = [session for key, session in self._sessions.items() if key[1] == client]
        if not bounded:
            pass
        elif len(own) >= self._bounds.per_client:
            gone.append(self._make_room(own, now_s, f"{len(own)} sessions of one client, no more are held at once"))
        elif len(self) >= self._bounds.sessions:
            everyone = list(self._sessions.values())
            gone.append(self._make_room(everyone, now_s, f"{len(self)} sessions, no more are held at once"))
        session = Session(client, id_, model, now_s)
        self._sessions[model.family.id, client, id_] = session
        return session, gone

    def reserve(self, wanted: Session, positions: int, now_s: float) -> list[Session]:
        """Room for so many more positions of a session; what made it. Raises SessionLimit."""
        gone = []
        # Buffers double when they grow: what is there already may be enough.
        needed = positions * wanted.model.position_bytes
        while self.cache_bytes + needed > self._bounds.cache_bytes:
            others = [session for session in self._sessions.values() if session is not wanted]
            taken_mb, most_mb = self.cache_bytes >> 20, self._bounds.cache_bytes >> 20
            said = f"the caches of {len(self)} sessions take {taken_mb} MB, {most_mb} are allowed"
            gone.append(self._make_room(others, now_s, said))
        return gone

    def close(self, family: str, client: str, id_: bytes) -> Session | None:
        """Forget it."""
        session = self._sessions.pop((family, client, id_), None)
        if session is not None:
            session.closed = True
        return session

    def expire(self, now_s: float) -> list[Session]:
        """Forget those that have idled."""
        gone = []
        for session in list(self._sessions.values()):
            if now_s - session.used_s <= self._bounds.idle_s:
                break
            if session.job is None:
                gone.append(self._forget(session))
        self.expired += len(gone)
        return gone

    def _make_room(self, among: list[Session], now_s: float, why: str) -> Session:
        for session in among:
            if session.job is None and now_s - session.used_s >= self._bounds.keep_s:
                self.evicted += 1
                return self._forget(session)
        raise SessionLimit(f"{why}: end one, or ask another server")

    def _forget(self, session: Session) -> Session:
        self.close(session.model.family.id, session.client, session.id)
        return session
