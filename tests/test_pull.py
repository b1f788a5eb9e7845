"""`kinflow pull` from real servers: whole, resumed, damaged, signed, older, and what stays meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from authority import TestAuthority
from brokers import KINDS
from kinflow import Device, TextDevice, frame, topics
from kinflow.bundle import MANIFEST
from kinflow.cli.app import app
from kinflow.errors import BundleError, LinkError, ServerFailed, SettingsError
from kinflow.family import Family
from kinflow.messages import NodeStatus, Served
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.pull import Pulled, Wanted, pull, version_order
from kinflow.settings import BrokerSettings, DeviceSettings, ServerSettings, TlsSettings
from kinflow.signing import SigningKey, TrustedKeys
from kinflow.source import PART_TIMEOUT_S, BundleSource, Chunk
from kinflow_edge.allowance import MAX_CLIENTS, Allowance
from kinflow_edge.server import Server
from system_fixtures import copy_bundle, sample_images
from text_client import copy_tiny

NAME = "pulled"


@contextmanager
def serving(bundle: Path, tls: TlsSettings | None = None, **changes: object) -> Iterator[BrokerAddress]:
    settings = ServerSettings(
        bundles=[str(bundle)],
        broker=BrokerSettings(kind="mosquitto" if tls else KINDS[0], port=0),
        advertise=False,
        tls=tls or TlsSettings(),
        **changes,  # type: ignore[arg-type]
    )
    with Server("edge", settings) as server:
        yield server.broker.address


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_bundle(tmp_path_factory.mktemp("served") / "bundle", family=NAME)


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[BrokerAddress]:
    with serving(bundle) as address:
        yield address


def take(address: BrokerAddress, destination: Path, wanted: Wanted | None = None) -> Pulled:
    with BundleSource(address, "edge", NAME) as source:
        return pull(source, destination, wanted or Wanted())


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_device_takes_what_its_member_needs_and_runs(address: BrokerAddress, bundle: Path, tmp_path: Path) -> None:
    """Its own graph and tables, not the larger members'; the device answers from it as from the whole bundle."""
    there = tmp_path / "bundle"
    pulled = take(address, there)
    assert (pulled.family, pulled.replaced) == (NAME, "")
    names = left(there)
    assert "device.onnx" in names
    assert not names & {"edge.onnx", "cloud.onnx", "device.tflite"}
    assert pulled.bytes_down == sum((there / name).stat().st_size for name in names - {MANIFEST})
    image, local = sample_images(1)[0], DeviceSettings(offload=False)
    with Device.open(there, local) as new, Device.open(bundle, local) as whole:
        assert new.infer(image).confidence == whole.infer(image).confidence
    assert left(tmp_path) == {"bundle", os.readlink(there)}
    assert take(address, there).bytes_down == 0


def test_a_language_model_is_taken_too(tiny: Path, tmp_path: Path) -> None:
    """Tokenizer, template and the device's graphs; the text is that of the whole bundle, a damaged file is refused."""
    there = tmp_path / "bundle"
    copied = copy_tiny(tiny, tmp_path / "served")
    with serving(copied) as address, BundleSource(address, "edge", "tiny") as source:
        pulled = pull(source, there, Wanted())
        assert (pulled.family, pulled.version) == ("tiny", "1.0.0")
        names = left(there)
        assert {"tokenizer.json", "chat_template.jinja", "lower-int8.onnx", "lower-float.onnx"} <= names
        assert not names & {"upper-float.onnx", "branch-edge-float.onnx", "top-float.onnx"}
        assert pulled.bytes_down == sum((there / name).stat().st_size for name in names - {MANIFEST})
        assert pull(source, there, Wanted()).bytes_down == 0
        graph = copied / "head-int8.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
        with pytest.raises(BundleError, match=r"head-int8\.onnx of .* has sha256"):
            pull(source, tmp_path / "other", Wanted())
        assert not (tmp_path / "other").exists()
    said = []
    for bundle in (there, tiny):
        with TextDevice.open(bundle, DeviceSettings(offload=False)) as device:
            said.append([token.id for token in device.generate("Is it late?", max_tokens=20)])
    assert said[0] == said[1]


def test_an_interrupted_pull_goes_on_where_it_stopped(
    address: BrokerAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link breaks after some parts: the next attempt fetches only the rest, and the result is whole."""
    read = BundleSource.read
    asked: list[tuple[str, int]] = []

    def breaks(self: BundleSource, path: str, offset: int, length: int) -> Chunk:
        asked.append((path, offset))
        if path == "device.onnx" and offset >= 100_000 and len(asked) < 8:
            raise LinkError("the link broke")
        return read(self, path, offset, min(length, 50_000))

    monkeypatch.setattr(BundleSource, "read", breaks)
    there = tmp_path / "bundle"
    with pytest.raises(LinkError, match="the link broke"):
        take(address, there)
    assert not there.exists()
    asked.extend([("", 0)] * 8)
    pulled = take(address, there)
    whole = sum((there / name).stat().st_size for name in left(there) - {MANIFEST})
    assert ("device.onnx", 100_000) in asked[8:]
    assert ("device.onnx", 0) not in asked[8:]
    assert pulled.bytes_down <= whole - 100_000
    Family.load(there, member="device")


def test_damaged_parts_are_refused_and_nothing_changes(
    address: BrokerAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that differs: the hash tells, the file is thrown away, and the next attempt succeeds."""
    read = BundleSource.read

    def damaged(self: BundleSource, path: str, offset: int, length: int) -> Chunk:
        chunk = read(self, path, offset, length)
        return Chunk(chunk.total_bytes, chunk.data[:-1] + b"\xff") if path == "device.onnx" else chunk

    there = tmp_path / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(BundleSource, "read", damaged)
        with pytest.raises(BundleError, match=r"device\.onnx .* has sha256"):
            take(address, there)
    assert not there.exists()
    take(address, there)
    Family.load(there, member="device")


def changed(bundle: Path, folder: Path, **fields: object) -> Path:
    """A copy whose manifest says something else."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **fields}))
    return folder


def test_the_newer_replaces_the_older_and_never_the_other_way(bundle: Path, tmp_path: Path) -> None:
    """1.10 replaces 1.9, whose folder goes; back again only with leave; the same version with other content never."""
    there = tmp_path / "here/bundle"
    for version in ("1.9.0", "1.10.0"):
        with serving(changed(bundle, tmp_path / version, version=version)) as address:
            pulled = take(address, there)
            assert (pulled.version, Family.load(there, member="device").version) == (version, version)
    assert left(there.parent) == {"bundle", os.readlink(there)}
    with serving(tmp_path / "1.9.0") as address:
        with pytest.raises(BundleError, match="--allow-rollback"):
            take(address, there)
        assert Family.load(there, member="device").version == "1.10.0"
        assert take(address, there, Wanted(allow_rollback=True)).replaced == "1.10.0"
    other = changed(bundle, tmp_path / "same", version="1.9.0", title="other")
    with serving(other) as address, pytest.raises(BundleError, match="not newer"):
        take(address, there)


@pytest.mark.parametrize(
    ("older", "newer"), [("1.9", "1.10"), ("1.0.rc1", "1.0.1"), ("1", "1.1"), ("0.9.9", "1"), ("2024", "2025.1")]
)
def test_versions_are_ordered_by_their_numbers(older: str, newer: str) -> None:
    """Digits count as numbers: 10 comes after 9."""
    assert version_order(older) < version_order(newer)
    assert version_order(older) == version_order(older)


def test_the_old_one_stays_when_the_new_one_gives_no_answer(bundle: Path, tmp_path: Path) -> None:
    """A graph that is no graph, correctly hashed: it is tried before the swap, and the old bundle stays."""
    import hashlib

    there = tmp_path / "here/bundle"
    with serving(bundle) as address:
        take(address, there)
    before = os.readlink(there)
    broken = changed(bundle, tmp_path / "broken", version="9.0.0")
    manifest = json.loads((broken / MANIFEST).read_text())
    for segment in manifest["segments"].values():
        graph = segment["graphs"]["onnx"]["file"]
        if graph["path"] == "device.onnx":
            junk = os.urandom(graph["bytes"])
            (broken / graph["path"]).write_bytes(junk)
            graph["sha256"] = hashlib.sha256(junk).hexdigest()
    (broken / MANIFEST).write_text(json.dumps(manifest))
    with serving(broken) as address, pytest.raises(BundleError, match="the old one stays"):
        take(address, there)
    assert os.readlink(there) == before
    Device.open(there, DeviceSettings(offload=False))


def test_only_signed_bundles_are_taken_once_a_key_is_trusted(bundle: Path, tmp_path: Path) -> None:
    """Unsigned or of a foreign key: refused before a file is fetched; signed by the trusted one: taken."""
    pytest.importorskip("cryptography")
    good, bad = SigningKey(bytes(range(32))), SigningKey(bytes(32))
    wanted = Wanted(trusted=TrustedKeys.parse([good.public]))
    signed = changed(bundle, tmp_path / "signed")
    for key, taken in ((None, False), (bad, False), (good, True)):
        if key is not None:
            (signed / "family.sig").write_text(key.sign((signed / MANIFEST).read_bytes()) + "\n")
        with serving(signed) as address:
            there = tmp_path / "there/bundle"
            if taken:
                take(address, there, wanted)
                assert Family.load(there, trusted=wanted.trusted, member="device").signed_by == good.public
            else:
                with pytest.raises(BundleError, match="no valid signature"):
                    take(address, there, wanted)
                assert not there.parent.exists()


def test_what_is_there_is_not_overwritten(address: BrokerAddress, tmp_path: Path) -> None:
    """A folder that was not pulled stays as it is."""
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(SettingsError, match="was not pulled"):
        take(address, mine)


def test_a_family_that_is_not_served_is_said_at_once(address: BrokerAddress) -> None:
    """The servers' own statuses tell: nobody waits for parts that cannot come."""
    status = frame.pack(NodeStatus("edge-a", "edge", "ready", families=[Served(NAME, "1", {})]))
    with (
        Connection(address, "speaks", on_message=lambda *_: None) as node,
        BundleSource(address, "edge", "no-such-family") as source,
    ):
        assert node.wait_connected(10)
        node.publish(topics.status("edge-a"), status, retain=True)
        begin_s = time.monotonic()
        with pytest.raises(ServerFailed, match=f"{NAME} is served here, not no-such-family"):
            source.read(MANIFEST, 0, 10)
        assert time.monotonic() - begin_s < 3 * PART_TIMEOUT_S
        node.publish(topics.status("edge-a"), b"", retain=True)


def test_a_file_outside_the_bundle_cannot_be_asked_for(address: BrokerAddress) -> None:
    """The server hands out what its manifest names, by name: there is no path to climb."""
    with BundleSource(address, "edge", NAME) as source:
        for path in ("../bundle/family.json", "/etc/passwd", "nothing"):
            with pytest.raises(ServerFailed, match="has no file"):
                source.read(path, 0)
        assert source.read("device.onnx", 10**9).data == b""


def test_one_device_cannot_take_all_of_the_line(bundle: Path, tmp_path: Path) -> None:
    """Beyond its bytes a second a client is told to wait, and still gets everything."""
    with serving(bundle, pull_bytes_per_s=600_000.0) as address:
        assert take(address, tmp_path / "bundle").bytes_down > 600_000


def test_an_allowance_fills_up_again() -> None:
    """A burst, then the rate; clients do not share it; the longest silent one is forgotten."""
    allowance = Allowance(100.0)
    assert allowance.take("a", 100, 0.0) == 0
    assert allowance.take("a", 50, 0.0) == pytest.approx(0.5)
    assert allowance.take("b", 100, 0.0) == 0
    assert allowance.take("a", 50, 0.5) == 0
    assert allowance.take("a", 1000, 9.0) == 0
    assert allowance.take("a", 1, 10.0) > 8
    for number in range(MAX_CLIENTS + 10):
        allowance.take(f"c{number}", 1, 20.0)
    assert len(allowance._clients) == MAX_CLIENTS


@pytest.mark.skipif("mosquitto" not in KINDS, reason="mosquitto is not installed")
def test_the_command_under_tls(bundle: Path, tmp_path: Path) -> None:
    """With its certificate a device pulls; the summary is one JSON object; the second time nothing comes."""
    pytest.importorskip("cryptography")
    pki = TestAuthority(tmp_path)
    with serving(bundle, pki.tls("edge.kitchen")) as address:
        words = ["pull", NAME, str(tmp_path / "bundle"), "--broker", str(address), "--tls", pki.tls("device.a").folder]
        said = [CliRunner().invoke(app, [*words, "--json"]) for _ in range(2)]
    assert [done.exit_code for done in said] == [0, 0], said[0].output
    first, second = (json.loads(done.stdout) for done in said)
    assert first["bytes_down"] > 0
    assert second == {**first, "bytes_down": 0, "replaced": first["version"]}


def test_no_split_can_be_mistaken_for_the_bundle_topic() -> None:
    """Names begin with a letter or a digit, the topic's level does not."""
    assert topics.asks_for_bundle(topics.bundle("edge", "f", "c"))
    assert not topics.asks_for_bundle(topics.request("edge", "f", "s1", "c"))
    assert topics.bundle("edge", "f", "c").split("/")[4] == "_bundle"
