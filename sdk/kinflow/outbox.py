"""What waits for a link: a bounded queue in one SQLite file, which survives a power cut. No network.

An entry is in one of three states: queued, answered, gone. Each change is one transaction, written through to the
disk, so an entry is answered once and its answer is handed out once.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kinflow.answer import Answer
from kinflow.errors import OutboxError

_TABLE = """
CREATE TABLE IF NOT EXISTS entries (
  id BLOB PRIMARY KEY,
  family TEXT NOT NULL,
  version TEXT NOT NULL,
  split TEXT NOT NULL,
  codec TEXT NOT NULL,
  payload BLOB NOT NULL,
  own BLOB NOT NULL,
  answer BLOB
)
"""
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Answer).decode


@dataclass(frozen=True)
class Entry:
    """One input that a server is to answer when there is one."""

    id: bytes
    """The request id: 16 bytes."""
    family: str
    version: str
    split: str
    codec: str
    payload: bytes
    """Coded features."""
    own: Answer
    """What the device said itself."""


class Outbox:
    """For any thread. Closed with `close`."""

    def __init__(self, path: str | Path, capacity: int) -> None:
        """Opens the file, or makes it. Raises OutboxError."""
        self._path = Path(path)
        self._capacity = capacity
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Transactions are explicit; access is under the lock.
            self._base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.execute(_TABLE)
            self._path.chmod(0o600)  # features are private data
        except (sqlite3.Error, OSError) as exc:
            raise OutboxError(f"outbox {path}: {exc}: name a file in a folder that can be written") from exc

    def close(self) -> None:
        with self._lock:
            self._base.close()

    def __len__(self) -> int:
        """Entries in it, answered ones too."""
        return int(self._execute("SELECT count(*) FROM entries")[0][0])

    def put(self, entry: Entry) -> None:
        """On the disk when this returns. Raises OutboxError when the outbox is full or the disk is."""
        with self._lock, self._errors():
            full = self._base.execute("SELECT count(*) FROM entries").fetchone()[0] >= self._capacity
            if full:
                raise OutboxError(f"the outbox holds {self._capacity} entries already (outbox_size)")
            row = (entry.id, entry.family, entry.version, entry.split, entry.codec, entry.payload, _encode(entry.own))
            self._base.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", row)

    def queued(self, after: int, most: int) -> list[tuple[int, Entry]]:
        """The oldest unanswered entries behind the row `after`, each with its row number."""
        rows = self._execute(
            "SELECT rowid, id, family, version, split, codec, payload, own FROM entries "
            "WHERE answer IS NULL AND rowid > ? ORDER BY rowid LIMIT ?",
            (after, most),
        )
        return [
            (row, Entry(id_, family, version, split, codec, payload, _decode(own)))
            for row, id_, family, version, split, codec, payload, own in rows
        ]

    def answered(self, id_: bytes, answer: Answer) -> None:
        """The payload is forgotten at once."""
        self._execute("UPDATE entries SET answer = ?, payload = x'' WHERE id = ?", (_encode(answer), id_))

    def answers(self) -> list[tuple[bytes, Answer]]:
        """Answers that nobody has taken."""
        rows = self._execute("SELECT id, answer FROM entries WHERE answer IS NOT NULL ORDER BY rowid")
        return [(row[0], _decode(row[1])) for row in rows]

    def remove(self, id_: bytes) -> None:
        """Its answer has been taken."""
        self._execute("DELETE FROM entries WHERE id = ?", (id_,))

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._errors():
            return self._base.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, msgspec.DecodeError) as exc:
            raise OutboxError(f"outbox {self._path}: {exc}") from exc
