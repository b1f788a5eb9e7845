"""`kinflow pki`: the family's own authority. Its folder belongs on a machine that no device can reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinflow.cli.passphrase import PassphraseFile, ask_passphrase
from kinflow.errors import SettingsError
from kinflow.identity import Identity, Role

if TYPE_CHECKING:
    from kinflow.authority import Issued

app = typer.Typer(no_args_is_help=True, help="Certificates for devices and servers (mutual TLS).")

Folder = Annotated[Path, typer.Option("--pki", help="The authority's folder.")]
ROLE_HELP = "device, edge or cloud."
DEFAULT_FOLDER = Path("pki")
OWNER = "the authority"


@app.command()
def init(
    pki: Folder = DEFAULT_FOLDER,
    name: Annotated[str, typer.Option(help="Name in the authority's certificate.")] = "kinflow authority",
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make an authority: a certificate for ten years and its encrypted key."""
    from kinflow.authority import Authority

    Authority.create(pki, name, ask_passphrase(OWNER, passphrase_file, new=True))
    typer.echo(f"{pki} holds the authority {name!r}. Keep ca.key and its passphrase: whoever has both can be anybody.")


@app.command()
def issue(
    role: Annotated[Role, typer.Argument(help=ROLE_HELP)],
    name: Annotated[str, typer.Argument(help="Name of the device or server.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make (ROLE.NAME).", show_default=False)] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificate is valid.")] = 730,
    renew: Annotated[bool, typer.Option("--renew", help="Although a valid certificate of this name exists.")] = False,
    pki: Folder = DEFAULT_FOLDER,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Issue a certificate: the folder it makes is what `tls.folder` or --tls names on that machine."""
    _issue(Identity.parse(f"{role}.{name}"), out, days, renew, pki, passphrase_file)


@app.command()
def enrol(
    name: Annotated[str, typer.Argument(help="Name of the device.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make (device.NAME).", show_default=False)] = None,
    at: Annotated[Path, typer.Option(help="Where the folder will lie on the device.")] = Path("/etc/kinflow"),
    trust: Annotated[
        list[str] | None,
        typer.Option(help="Key (see kinflow sign) that bundles must be signed with; may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificate is valid.")] = 730,
    renew: Annotated[bool, typer.Option("--renew", help="Although a valid certificate of this name exists.")] = False,
    pki: Folder = DEFAULT_FOLDER,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Issue a device's certificate with its settings: copy the folder to the device, and it belongs."""
    from kinflow.signing import TrustedKeys

    keys = TrustedKeys.parse(trust or ()).lines()
    identity = Identity.parse(f"device.{name}")
    folder = out or Path(str(identity))
    if (folder / "device.toml").exists():
        raise SettingsError(f"{folder / 'device.toml'} exists: name another folder")
    _issue(identity, folder / "tls", days, renew, pki, passphrase_file)
    # JSON's strings and lists are TOML's.
    trusted = f"trusted_keys = {json.dumps(keys)}\n\n" if keys else ""
    text = f"{trusted}[tls]\nfolder = {json.dumps(str(at / 'tls'))}\n"
    (folder / "device.toml").write_text(text, encoding="utf-8")
    typer.echo(f"copy {folder}/ to {at}/ on the device; its key is in there, so delete the copy here")


@app.command()
def revoke(
    identity: Annotated[str, typer.Argument(help="ROLE.NAME, as `kinflow pki list` shows it.")],
    to: Annotated[
        list[Path] | None,
        typer.Option(help="TLS folder to bring the new list to, on this machine or mounted; may be repeated."),
    ] = None,
    pki: Folder = DEFAULT_FOLDER,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Revoke a certificate: every server's TLS folder needs the new crl.pem; a running server sees that by itself."""
    from kinflow.authority import Authority

    authority = Authority(pki)
    for folder in to or ():
        authority.check_holder(folder)
    revoked = authority.revoke(Identity.parse(identity), ask_passphrase(OWNER, passphrase_file))
    typer.echo(f"{identity} is revoked ({', '.join(f'{issued.serial:x}' for issued in revoked)})")
    for folder in to or ():
        authority.tell(folder)
        typer.echo(f"{folder} has the new list")
    typer.echo(f"copy {pki / 'crl.pem'} into the TLS folder of every {'other ' if to else ''}server")


@app.command("list")
def list_issued(
    pki: Folder = DEFAULT_FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> None:
    """List what was issued: valid, expired, revoked."""
    from kinflow.authority import Authority

    rows = [_record(issued) for issued in Authority(pki).issued()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    width = max((len(row["identity"]) for row in rows), default=0)
    for row in rows:
        typer.echo(f"{row['identity']:{width}}  {row['state']:7}  until {row['expires']}  {row['serial']}")


def _issue(
    identity: Identity, out: Path | None, days: int, renew: bool, pki: Path, passphrase_file: Path | None
) -> None:
    from kinflow.authority import Authority

    folder = out or Path(str(identity))
    issued = Authority(pki).issue(identity, folder, ask_passphrase(OWNER, passphrase_file), days=days, renew=renew)
    typer.echo(f"{folder} holds the key and the certificate of {identity}, valid until {issued.expires:%Y-%m-%d}")


def _record(issued: Issued) -> dict[str, str]:
    return {
        "identity": str(issued.identity),
        "state": issued.state,
        "expires": f"{issued.expires:%Y-%m-%d}",
        "serial": f"{issued.serial:x}",
    }
