"""Training state on disk: written whole or not at all, and bound to the recipe that made it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from kinflow.errors import SettingsError

State = dict[str, Any]


def save(path: Path, digest: str, state: State) -> None:
    """Replaces the file in one step, so that an interruption leaves the older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    torch.save({"recipe": digest, **state}, temporary)
    os.replace(temporary, path)


def load(path: Path, digest: str) -> State | None:
    """None when there is no checkpoint. Raises SettingsError when it is broken or of another recipe."""
    if not path.is_file():
        return None
    try:
        state: State = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as exc:
        raise SettingsError(f"{path} is not a checkpoint ({exc}): start anew with --fresh") from exc
    if state.pop("recipe", None) != digest:
        raise SettingsError(f"{path} belongs to another recipe or other options: start anew with --fresh")
    return state
