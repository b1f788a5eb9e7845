"""Takes a member of a bundle from a server: resumed where it stopped, verified, tried, then swapped in.

`destination` becomes a symbolic link to a folder beside it, `.<name>-<version>-<hash>`; a rename swaps it, so that a
reader finds the old bundle or the new one. What arrives is collected in `.<name>.pull`, which outlives an
interruption. The old one is removed once the new one has given an answer here.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kinflow.bundle import MANIFEST, MAX_MANIFEST_BYTES, safe_path, task_in, task_of
from kinflow.errors import BundleError, SettingsError
from kinflow.family import Family, read_manifest
from kinflow.files import write_whole
from kinflow.manifest import BackendName, File, Manifest
from kinflow.ready import ready
from kinflow.signing import MAX_SIGNATURE_BYTES, NO_KEYS, SIGNATURE, TrustedKeys
from kinflow.source import PART_BYTES, BundleSource
from kinflow.text.family import read_text_manifest
from kinflow.text.manifest import TASK, TextManifest

SPARE_BYTES = 16 << 20
TRIAL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Pulled:
    """What is at the destination now."""

    family: str
    version: str
    replaced: str
    """The version that was there; empty when there was none, the same when nothing had to be done."""
    bytes_down: int
    """Of files, this time: what an earlier attempt had left is not counted."""


@dataclass(frozen=True)
class Wanted:
    """What is pulled, and what is accepted."""

    member: str = "device"
    backend: BackendName = "onnx"
    """Of an image family; a language model has no other."""
    trusted: TrustedKeys = NO_KEYS
    allow_rollback: bool = False


def pull(source: BundleSource, destination: Path, wanted: Wanted) -> Pulled:
    """Raises BundleError (nothing is changed then), SettingsError, LinkError."""
    if destination.exists() and not destination.is_symlink():
        raise SettingsError(f"{destination} exists and was not pulled: name another place")
    raw = _read_whole(source, MANIFEST, MAX_MANIFEST_BYTES)
    signatures = _read_whole(source, SIGNATURE, MAX_SIGNATURE_BYTES)
    manifest = _read_manifest(raw, signatures, wanted.trusted, str(source.address))
    if wanted.member not in manifest.members:
        raise BundleError(f"{manifest.id} has no member {wanted.member!r}, it has {', '.join(manifest.members)}")
    current = _current(destination)
    if current is not None and _check_successor(current, manifest, raw, wanted.allow_rollback):
        return Pulled(manifest.id, manifest.version, current.version, 0)
    stage = destination.with_name(f".{destination.name}.pull")
    bytes_down = _collect(source, stage, manifest, raw, signatures, wanted)
    _try_out(stage, wanted)
    _swap(stage, destination, f"{manifest.version}-{hashlib.sha256(raw).hexdigest()[:8]}")
    return Pulled(manifest.id, manifest.version, "" if current is None else current.version, bytes_down)


def _read_manifest(raw: bytes, signatures: bytes, trusted: TrustedKeys, name: str) -> Manifest | TextManifest:
    """Raises BundleError."""
    if trusted.keys:
        trusted.check(raw, signatures, name)
    if task_in(raw, name) == TASK:
        return read_text_manifest(raw, signatures, trusted, name)[0]
    return read_manifest(raw, signatures, trusted, name)[0]


@ready
class _Named(msgspec.Struct):
    id: str
    version: str


@dataclass(frozen=True)
class _Current:
    family: str
    version: str
    raw: bytes


def _current(destination: Path) -> _Current | None:
    try:
        raw = (destination / MANIFEST).read_bytes()
        manifest = msgspec.json.decode(raw, type=_Named)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as exc:
        raise BundleError(f"{destination} is not a bundle ({exc}): remove it, and pull again") from exc
    return _Current(manifest.id, manifest.version, raw)


def _check_successor(current: _Current, manifest: Manifest | TextManifest, raw: bytes, allow_rollback: bool) -> bool:
    """Whether it is there already. Raises BundleError for another family, or an older version without leave."""
    if manifest.id != current.family:
        raise BundleError(f"the bundle there is {current.family}, the server has {manifest.id}: name another place")
    if raw == current.raw:
        return True
    if not allow_rollback and version_order(manifest.version) <= version_order(current.version):
        raise BundleError(
            f"{manifest.id} {current.version} is there, the server has {manifest.version}, which is not newer: "
            "to take it all the same, --allow-rollback"
        )
    return False


def version_order(version: str) -> list[tuple[int, int, str]]:
    """For comparing: digits as numbers, other signs as text, and text before numbers ("1.0.rc1" < "1.0.1")."""
    parts = re.findall(r"\d+|[A-Za-z]+", version)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _read_whole(source: BundleSource, path: str, limit_bytes: int) -> bytes:
    data = b""
    while True:
        chunk = source.read(path, len(data), min(PART_BYTES, limit_bytes))
        if chunk.total_bytes > limit_bytes:
            raise BundleError(
                f"{path} of {source.address} has {chunk.total_bytes} bytes, at most {limit_bytes} are read"
            )
        data += chunk.data
        if len(data) >= chunk.total_bytes:
            return data
        if not chunk.data:
            raise BundleError(f"{path} of {source.address} ends at {len(data)} of {chunk.total_bytes} bytes")


def _collect(
    source: BundleSource,
    stage: Path,
    manifest: Manifest | TextManifest,
    raw: bytes,
    signatures: bytes,
    wanted: Wanted,
) -> int:
    """Everything into `stage`, which keeps what an earlier attempt at the same bundle had got; bytes that came."""
    if stage.exists() and (not (stage / MANIFEST).exists() or (stage / MANIFEST).read_bytes() != raw):
        shutil.rmtree(stage)
    if isinstance(manifest, TextManifest):
        wanted_files = manifest.files_of(wanted.member)
    else:
        wanted_files = manifest.files_of(wanted.member, wanted.backend)
    files = {file.path: file for file in wanted_files}
    needed = sum(file.bytes for file in files.values())
    stage.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(stage.parent).free
    if free < needed + SPARE_BYTES:
        raise BundleError(f"{manifest.id} needs {needed} bytes, {stage.parent} has {free} left")
    write_whole(stage / MANIFEST, raw)
    if signatures:
        write_whole(stage / SIGNATURE, signatures)
    return sum(_fetch(source, stage, file) for file in files.values())


def _fetch(source: BundleSource, stage: Path, file: File) -> int:
    target = stage / safe_path(str(source.address), file.path)
    if target.exists():
        return 0
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    came = 0
    with part.open("ab") as stream:
        if stream.tell() > file.bytes:
            stream.truncate(0)
        while (offset := stream.tell()) < file.bytes:
            chunk = source.read(file.path, offset, min(PART_BYTES, file.bytes - offset))
            if not chunk.data:
                raise BundleError(f"{file.path} of {source.address} ends at {offset} of {file.bytes} bytes")
            stream.write(chunk.data)
            came += len(chunk.data)
        stream.flush()
        os.fsync(stream.fileno())
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    if digest != file.sha256:
        part.unlink()
        raise BundleError(f"{file.path} of {source.address} has sha256 {digest[:12]}…, the manifest says otherwise")
    os.replace(part, target)
    return came


def _try_out(folder: Path, wanted: Wanted) -> None:
    """One answer of the new member, in a process of its own: a graph can take its process with it."""
    if task_of(folder) != TASK:
        Family.load(folder, trusted=wanted.trusted, member=wanted.member, backend=wanted.backend)
    command = [sys.executable, "-m", "kinflow.trial", str(folder), wanted.member, wanted.backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as exc:
        raise BundleError(f"the new bundle gave no answer within {TRIAL_TIMEOUT_S:.0f} s: the old one stays") from exc
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        raise BundleError(f"the new bundle gave no answer (status {done.returncode}), the old one stays: {last}")


def _swap(stage: Path, destination: Path, label: str) -> None:
    folder = destination.with_name(f".{destination.name}-{label}")
    old = destination.resolve() if destination.is_symlink() else None
    if folder.exists() and folder.resolve() != old:
        shutil.rmtree(folder)
    os.replace(stage, folder)
    link = destination.with_name(f".{destination.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, destination)
    if old is not None and old != folder.resolve() and old.parent == folder.resolve().parent:
        shutil.rmtree(old, ignore_errors=True)
