"""What `kinflow device` says about one frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kinflow.answer import Answer
from kinflow.board import BoardState


@dataclass(frozen=True)
class Report:
    device: str
    frame: str
    time_s: float
    """Unix time of the answer."""
    answer: Answer
    board: BoardState | None
    stale: int
    """Frames dropped so far because newer ones came."""

    def record(self) -> dict[str, Any]:
        """The JSON object of files, standard output and MQTT. docs/boards.md lists the keys."""
        answer, board = self.answer, self.board
        return {
            "device": self.device,
            "time_s": round(self.time_s, 3),
            "frame": self.frame,
            "label": answer.label,
            "confidence": round(answer.confidence, 4),
            "tier": answer.tier,
            "degraded": answer.degraded,
            "reason": answer.reason,
            "bytes_up": answer.bytes_up,
            "total_ms": round(answer.total_ms, 2),
            "temperature_c": None if board is None or board.temperature_c is None else round(board.temperature_c, 1),
            "load": None if board is None or board.load is None else round(board.load, 2),
            "stale": self.stale,
            "request_id": answer.request_id,
        }
