"""Writes a bundle's folder: everything into a temporary one beside it, verified, then renamed into place."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kinflow.bundle import MANIFEST
from kinflow.family import Family
from kinflow.manifest import File, Manifest


@contextmanager
def staged(folder: Path, load: Callable[[Path], object] = Family.load) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` in the end; after an error that is as it was.

    `load` reads it back before: it raises BundleError for a bundle that does not hold together.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield stage
        load(stage)
        stage.chmod(0o755)
        _replace(folder, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def describe(stage: Path, name: str) -> File:
    """A file that stands in the folder, as the manifest lists it."""
    raw = (stage / name).read_bytes()
    return File(name, hashlib.sha256(raw).hexdigest(), len(raw))


def write_manifest(stage: Path, manifest: Manifest) -> Family:
    """Writes family.json and reads the bundle back. Raises BundleError when it does not hold together."""
    raw = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (stage / MANIFEST).write_bytes(raw + b"\n")
    return Family.load(stage)


def size_bytes(folder: Path) -> int:
    """Of all files in the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _replace(folder: Path, stage: Path) -> None:
    old = None
    if folder.exists():
        old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
        os.replace(folder, old)
    os.replace(stage, folder)
    if old is not None:
        shutil.rmtree(old)
