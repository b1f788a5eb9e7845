"""`kinflow sign` and `kinflow verify`: who made a bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kinflow.bundle import MANIFEST, task_of
from kinflow.cli.passphrase import PassphraseFile, ask_passphrase
from kinflow.errors import BundleError, SettingsError
from kinflow.family import Family
from kinflow.files import write_whole
from kinflow.manifest import BackendName
from kinflow.signing import NO_KEYS, SIGNATURE, SigningKey, TrustedKeys
from kinflow.text.family import TextFamily
from kinflow.text.manifest import TASK

BundleFolder = Annotated[Path, typer.Argument(help="Folder of a bundle.")]


def sign(
    bundle: BundleFolder,
    key: Annotated[Path, typer.Option(help="File of the signing key.")],
    new_key: Annotated[bool, typer.Option("--new-key", help="Make the key first.")] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign a bundle: adds a line to its family.sig, and shows the public key that devices are to trust."""
    passphrase = ask_passphrase("the signing key", passphrase_file, new=new_key)
    if new_key:
        _make_key(key, passphrase)
    signing = SigningKey.read(key, passphrase)
    family, _ = _whole(bundle)
    if not bundle.is_dir():
        raise SettingsError(f"{bundle} is a .zip: sign the folder, then pack it")
    manifest = (bundle / MANIFEST).read_bytes()
    file = bundle / SIGNATURE
    # Of the signatures that are there, those that are valid for this manifest stay.
    lines = [line for line in (file.read_text().splitlines() if file.exists() else []) if _holds(line, manifest)]
    lines = [line for line in lines if not line.startswith(signing.public)]
    write_whole(file, "".join(f"{line}\n" for line in [*lines, signing.sign(manifest)]).encode())
    typer.echo(f"{family.id} {family.version} is signed. Devices and servers trust it with:")
    typer.echo(f'trusted_keys = ["{signing.public}"]')


def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder or .zip of a bundle.")],
    key: Annotated[
        list[str] | None, typer.Option(help="Trusted key, ed25519:…; may be repeated.", show_default=False)
    ] = None,
    member: Annotated[str, typer.Option(help="Check the files of this member alone.")] = "",
    backend: Annotated[BackendName, typer.Option(help="Of that member: onnx or tflite.")] = "onnx",
) -> None:
    """Check every hash of a bundle and, with --key, its signature. Exit status 2 when something is wrong."""
    family, files = _whole(bundle, TrustedKeys.parse(key or ()), member, backend)
    by = f"signed by {family.signed_by}" if family.signed_by else "no --key was given: its signature was not checked"
    typer.echo(f"{family.id} {family.version}: {files} files are whole; {by}")


def _whole(
    bundle: Path, trusted: TrustedKeys = NO_KEYS, member: str = "", backend: BackendName = "onnx"
) -> tuple[Family | TextFamily, int]:
    """The bundle and how many of its files were compared with their hashes. Raises BundleError."""
    if task_of(bundle) != TASK:
        family = Family.load(bundle, trusted=trusted, member=member, backend=backend)
        return family, len(family.files)
    if member:
        raise SettingsError("--member is for image families: a language model's bundle is checked whole")
    text = TextFamily.load(bundle, trusted=trusted)
    return text, len(text.verify())


def _make_key(file: Path, passphrase: str) -> None:
    if file.exists():
        raise SettingsError(f"{file} exists: leave --new-key out, or name another file")
    write_whole(file, SigningKey(os.urandom(32)).pem(passphrase), secret=True)


def _holds(line: str, manifest: bytes) -> bool:
    try:
        return bool(TrustedKeys.parse([line.partition(" ")[0]]).check(manifest, line.encode(), ""))
    except (SettingsError, BundleError):
        return False
