"""`kinflow pki`, `sign` and `verify` as commands: what they make, what they refuse, what OpenSSL says of it."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kinflow import settings
from kinflow.bundle import MANIFEST
from kinflow.cli.app import app
from kinflow.errors import BundleError, SettingsError
from kinflow.family import Family
from kinflow.identity import Identity
from kinflow.signing import SIGNATURE, TrustedKeys

pytest.importorskip("cryptography", reason="certificates are made with it: pip install 'kinflow[pki]'")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

PASSPHRASE = "a passphrase for tests"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an authority in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "word").write_text(f"{PASSPHRASE}\nsomething else\n")
    kinflow("pki", "init", "--passphrase-file", "word")
    return tmp_path


def kinflow(*words: str, fails: str = "", typed: str = "") -> str:
    """The command's output; `fails`: what it says when it must end with status 2."""
    done = CliRunner().invoke(app, list(words), input=typed or None)
    assert done.exit_code == (2 if fails else 0), done.output
    assert fails in done.output
    return done.output


def issue(*words: str, fails: str = "") -> str:
    return kinflow("pki", "issue", *words, "--passphrase-file", "word", fails=fails)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def test_secret_files_are_their_owner_s_alone(here: Path) -> None:
    """Keys have mode 0600 from the start, their folders 0700, and the authority's key is encrypted."""
    issue("edge", "kitchen")
    assert mode(here / "pki/ca.key") == mode(here / "edge.kitchen/key.pem") == 0o600
    assert mode(here / "pki") == mode(here / "edge.kitchen") == 0o700
    assert b"ENCRYPTED" in (here / "pki/ca.key").read_bytes()
    assert sorted(path.name for path in (here / "edge.kitchen").iterdir()) == [
        "ca.pem",
        "cert.pem",
        "crl.pem",
        "key.pem",
    ]


@pytest.mark.parametrize(("role", "server"), [("device", False), ("edge", True), ("cloud", True)])
def test_a_certificate_says_who_and_what_for(here: Path, role: str, server: bool) -> None:
    """Role and name in the common name; only a server's certificate is for servers; nobody's can sign others."""
    issue(role, "a-1", "--days", "10")
    made = certificate(here / f"{role}.a-1")
    assert made.subject.rfc4514_string() == f"CN={role}.a-1"
    usages = set(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usages == {ExtendedKeyUsageOID.CLIENT_AUTH} | ({ExtendedKeyUsageOID.SERVER_AUTH} if server else set())
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert 10 <= (made.not_valid_after_utc - made.not_valid_before_utc).days <= 11
    key = made.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_the_list_shows_what_became_of_each(here: Path) -> None:
    """valid, then revoked; the list that servers get holds exactly the revoked serial numbers."""
    issue("device", "cam-1")
    issue("device", "cam-2")
    kinflow("pki", "revoke", "device.cam-2", "--passphrase-file", "word")
    rows = {row["identity"]: row for row in json.loads(kinflow("pki", "list", "--json"))}
    assert {name: row["state"] for name, row in rows.items()} == {"device.cam-1": "valid", "device.cam-2": "revoked"}
    revoked = x509.load_pem_x509_crl((here / "pki/crl.pem").read_bytes())
    assert [f"{entry.serial_number:x}" for entry in revoked] == [rows["device.cam-2"]["serial"]]
    assert "device.cam-2  revoked" in kinflow("pki", "list")
    kinflow("pki", "revoke", "device.cam-2", "--passphrase-file", "word", fails="has no valid certificate")


def test_the_new_list_is_brought_to_servers_that_are_named(here: Path) -> None:
    """`revoke --to`: whole, to holders of this authority alone, and where one is not, nobody is revoked yet."""
    issue("edge", "kitchen")
    issue("device", "cam-1")
    word = ("--passphrase-file", "word")
    before = (here / "edge.kitchen/crl.pem").read_bytes()
    kinflow("pki", "init", "--pki", "theirs", *word)
    for folder, why in (("nowhere", "is no TLS folder"), ("theirs", "belongs to another authority")):
        kinflow("pki", "revoke", "device.cam-1", "--to", "edge.kitchen", "--to", folder, *word, fails=why)
    assert (here / "edge.kitchen/crl.pem").read_bytes() == before == (here / "pki/crl.pem").read_bytes()
    assert "edge.kitchen has the new list" in kinflow("pki", "revoke", "device.cam-1", "--to", "edge.kitchen", *word)
    assert (here / "edge.kitchen/crl.pem").read_bytes() == (here / "pki/crl.pem").read_bytes() != before


def test_one_identity_has_one_holder(here: Path) -> None:
    """A second certificate of a name needs --renew, or the first to be revoked."""
    issue("device", "cam-1")
    issue("device", "cam-1", "--out", "again", fails="--renew")
    assert not (here / "again").exists()
    issue("device", "cam-1", "--out", "again", "--renew")
    issue("device", "cam-1", "--out", "again", "--renew", fails="holds a key already")
    kinflow("pki", "revoke", "device.cam-1", "--passphrase-file", "word")
    issue("device", "cam-1", "--out", "third")
    assert len(json.loads(kinflow("pki", "list", "--json"))) == 3


def test_wrong_words_change_nothing(here: Path) -> None:
    """A wrong passphrase, a short one, a name with a slash, an authority that exists or that does not."""
    (here / "wrong").write_text("not the passphrase")
    before = sorted(path for path in here.rglob("*"))
    kinflow("pki", "issue", "device", "x", "--passphrase-file", "wrong", fails="is the passphrase right?")
    kinflow("pki", "init", "--passphrase-file", "word", fails="holds an authority already")
    kinflow("pki", "init", "--pki", "other", typed="short\nshort\n", fails="at least 8 are needed")
    issue("device", "../x", fails="identity 'device.../x'")
    issue("device", "x" * 60, fails="64 signs at most")
    kinflow("pki", "list", "--pki", "nowhere", fails="kinflow pki init")
    kinflow("pki", "issue", "device", "x", "--passphrase-file", "nowhere", fails="--passphrase-file nowhere")
    assert sorted(path for path in here.rglob("*")) == before


def test_enrolling_makes_a_folder_to_copy(here: Path) -> None:
    """One command: the device's certificate and its settings, which load."""
    key = f"ed25519:{'ab' * 32}"
    kinflow("pki", "enrol", "cam-1", "--trust", key, "--at", str(here / "device.cam-1"), "--passphrase-file", "word")
    chosen = settings.load("device", settings.DeviceSettings, here / "device.cam-1/device.toml")
    assert chosen.tls.folder == str(here / "device.cam-1/tls")
    assert chosen.trusted_keys == [key]
    from kinflow.tls import Credentials

    credentials = Credentials.load(chosen.tls)
    assert credentials is not None
    assert credentials.identity == Identity("device", "cam-1")
    kinflow("pki", "enrol", "cam-1", "--trust", "rsa:1", "--passphrase-file", "word", fails="trusted key 'rsa:1'")


@pytest.mark.parametrize("text", ["", "cam", "device.", ".cam", "admin.cam", "device.a/b", "device.+", "device.é"])
def test_an_identity_is_a_role_and_a_name(text: str) -> None:
    """Nothing that could be a wildcard or another level of a topic."""
    with pytest.raises(SettingsError, match=r"device\.NAME"):
        Identity.parse(text)
    assert str(Identity.parse("edge.a.b-c")) == "edge.a.b-c"


# Bundles


@pytest.fixture
def signed(here: Path, bundle: Path) -> tuple[Path, str]:
    """A signed copy of the small bundle, and the key that signed it."""
    folder = here / "bundle"
    shutil.copytree(bundle, folder)
    said = kinflow("sign", "bundle", "--key", "signing.key", "--new-key", "--passphrase-file", "word")
    return folder, said.split('"')[1]


def test_a_signed_bundle_is_taken_and_others_are_not(signed: tuple[Path, str], bundle: Path) -> None:
    """With a trusted key: the signed one loads, an unsigned one and one of another key do not."""
    folder, key = signed
    trusted = TrustedKeys.parse([key])
    assert Family.load(folder, trusted=trusted).signed_by == key
    assert mode(folder.parent / "signing.key") == 0o600
    with pytest.raises(BundleError, match="it is not signed"):
        Family.load(bundle, trusted=trusted)
    with pytest.raises(BundleError, match="it is signed by ed25519"):
        Family.load(folder, trusted=TrustedKeys.parse([f"ed25519:{'00' * 32}"]))
    assert Family.load(folder).signed_by == ""


def test_any_change_of_a_signed_bundle_is_refused(signed: tuple[Path, str]) -> None:
    """A space more in the manifest, a bit of a graph, a bit of the signature, half a line."""
    folder, key = signed
    trusted = TrustedKeys.parse([key])
    for name, change in (
        (MANIFEST, lambda data: data + b" "),
        (next(folder.glob("*.onnx")).name, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        (SIGNATURE, lambda data: data[:-3] + (b"0" if data[-3:-2] != b"0" else b"1") + data[-2:]),
        (SIGNATURE, lambda data: data[:100]),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(change(before))
        with pytest.raises(BundleError):
            Family.load(folder, trusted=trusted)
        (folder / name).write_bytes(before)
    assert Family.load(folder, trusted=trusted).signed_by == key


def test_two_keys_may_sign_while_one_replaces_the_other(signed: tuple[Path, str]) -> None:
    """A second signature stands beside the first; signing again with one key replaces its line."""
    folder, old = signed
    for _ in range(2):
        said = kinflow("sign", "bundle", "--key", "new.key", *_new(folder), "--passphrase-file", "word")
    new = said.split('"')[1]
    assert len((folder / SIGNATURE).read_text().splitlines()) == 2
    for key in (old, new):
        assert Family.load(folder, trusted=TrustedKeys.parse([key])).signed_by == key


def _new(folder: Path) -> list[str]:
    return [] if (folder.parent / "new.key").exists() else ["--new-key"]


def test_verify_says_what_it_checked(signed: tuple[Path, str]) -> None:
    """Hashes always, the signature with --key; status 2 when something is wrong."""
    folder, key = signed
    assert f"signed by {key}" in kinflow("verify", "bundle", "--key", key)
    assert "its signature was not checked" in kinflow("verify", "bundle")
    kinflow("verify", "bundle", "--key", f"ed25519:{'00' * 32}", fails="no valid signature of a trusted key")
    (folder / SIGNATURE).unlink()
    kinflow("verify", "bundle", "--key", key, fails="it is not signed")


def test_devices_and_servers_take_only_what_is_signed(signed: tuple[Path, str], bundle: Path) -> None:
    """`trusted_keys` in the settings hold for `Device.open` and for a server."""
    from kinflow.device import Device
    from kinflow_edge.server import Server

    folder, key = signed
    only = {"trusted_keys": [key]}
    Device.open(folder, settings.DeviceSettings(**only))
    with pytest.raises(BundleError, match="it is not signed"):
        Device.open(bundle, settings.DeviceSettings(**only))
    Server("cloud", settings.ServerSettings(bundles=[str(folder)], **only))
    with pytest.raises(BundleError, match="it is not signed"):
        Server("cloud", settings.ServerSettings(bundles=[str(bundle)], **only))
