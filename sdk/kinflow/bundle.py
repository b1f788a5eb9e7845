"""A bundle's files, from its folder or its .zip: read once, bounded, and checked against the manifest's hashes."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import TypeVar

import msgspec

from kinflow.errors import BundleError
from kinflow.manifest import File
from kinflow.ready import ready
from kinflow.signing import TrustedKeys

MANIFEST = "family.json"
MAX_MANIFEST_BYTES = 1 << 20

AnyManifest = TypeVar("AnyManifest", bound=msgspec.Struct)

# What runs a bundle, by its task.
USED_BY = {
    "image-classification": "kinflow.Device, `kinflow run`",
    "text-generation": "kinflow.TextDevice, `kinflow chat` and `kinflow generate`",
}


@ready
class _Task(msgspec.Struct):
    task: str = ""


def task_of(path: str | Path) -> str:
    """What a bundle is for, by its manifest: `image-classification` or `text-generation`. Raises BundleError."""
    reader = open_reader(Path(path))
    try:
        return task_in(reader.read(MANIFEST, MAX_MANIFEST_BYTES), str(path))
    finally:
        reader.close()


def task_in(raw: bytes, name: str) -> str:
    """The same of a manifest's bytes."""
    return _decode(raw, name, _Task).task


def decode_manifest(
    raw: bytes, signatures: bytes, trusted: TrustedKeys, name: str, kind: type[AnyManifest], task: str
) -> tuple[AnyManifest, str]:
    """The manifest and the trusted key that signed it, if any are asked for. Raises BundleError."""
    # Before anything of it is read: a stranger's bytes get no further than this.
    signed_by = trusted.check(raw, signatures, name) if trusted.keys else ""
    try:
        return _decode(raw, name, kind), signed_by
    except BundleError:
        found = task_in(raw, name)
        if found != task and found in USED_BY:
            raise BundleError(
                f"{name} is a bundle for {found!r}, wanted is one for {task!r}: use {USED_BY[found]}"
            ) from None
        raise


def _decode(raw: bytes, name: str, kind: type[AnyManifest]) -> AnyManifest:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BundleError(f"{name}/{MANIFEST}: {exc}") from exc


class FolderReader:
    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def read(self, name: str, limit: int) -> bytes:
        try:
            path = (self._root / name).resolve()
            if not path.is_relative_to(self._root):
                raise BundleError(f"{self._root}: the file {name!r} is outside the bundle")
            found = path.stat()
            # Reading a pipe or a device could wait for ever.
            if not stat.S_ISREG(found.st_mode):
                raise BundleError(f"{path} is not a regular file")
            if found.st_size > limit:
                raise BundleError(f"{path} has {found.st_size} bytes, at most {limit} are expected")
            return path.read_bytes()
        except OSError as exc:
            raise BundleError(f"{path}: {exc.strerror}: is this the folder of a bundle?") from exc
        except (ValueError, RuntimeError) as exc:  # a NUL in the name, links in a circle
            raise BundleError(f"{self._root}: cannot read {name!r}: {exc}") from exc

    def has(self, name: str) -> bool:
        return os.path.exists(self._root / name)

    def close(self) -> None:
        pass


class ZipReader:
    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            self._zip = zipfile.ZipFile(root)
        except Exception as exc:  # zipfile lets through what its parts raise: zlib.error, EOFError, …
            raise BundleError(f"{root} is neither the folder of a bundle nor a .zip of one: {exc}") from exc

    def read(self, name: str, limit: int) -> bytes:
        try:
            with self._zip.open(name) as stream:
                data = stream.read(limit + 1)
        except Exception as exc:  # as above
            raise BundleError(f"{self._root}: cannot read {name!r}: {exc}") from exc
        if len(data) > limit:
            raise BundleError(f"{self._root}: {name!r} has more than the {limit} bytes expected")
        return data

    def has(self, name: str) -> bool:
        return name in self._zip.namelist()

    def close(self) -> None:
        self._zip.close()


def open_reader(root: Path) -> FolderReader | ZipReader:
    if os.path.isdir(root):
        return FolderReader(root)
    # Not Path.is_file(), which raises on names that the system refuses.
    if os.path.isfile(root):
        return ZipReader(root)
    raise BundleError(f"{root} does not exist: give the folder or the .zip of a bundle")


def safe_path(root: str, path: str) -> PurePosixPath:
    """`path` of a manifest, which may not leave the bundle's folder. Raises BundleError."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise BundleError(f"{root}: the file {path!r} is outside the bundle")
    return parts


def read_verified(reader: FolderReader | ZipReader, root: Path, file: File) -> bytes:
    safe_path(str(root), file.path)
    data = reader.read(file.path, file.bytes)
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise BundleError(
            f"{root}: {file.path} has sha256 {digest[:12]}…, the manifest says {file.sha256[:12]}…: fetch it again"
        )
    return data
