"""Whole servers and devices under TLS: rogue announcements, revocation, refusals, and what stays out of logs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from authority import TestAuthority
from brokers import KINDS, wait_until
from kinflow import Device, frame, topics
from kinflow.discovery import Advert, Node
from kinflow.errors import SettingsError
from kinflow.family import Family
from kinflow.link import Link
from kinflow.messages import NodeStatus, Request, Served
from kinflow.mqtt import Connection
from kinflow.settings import BrokerSettings, DeviceSettings, ServerSettings, TlsSettings
from kinflow.stopping import Stop
from kinflow_edge.broker import Broker
from kinflow_edge.server import Server
from system_fixtures import LOOPBACK, copy_bundle, member_answer, running, sample_images
from tls_site import mosquitto_with

pytest.importorskip("cryptography", reason="certificates are made with it: pip install 'kinflow[pki]'")
pytestmark = pytest.mark.skipif("mosquitto" not in KINDS, reason="mosquitto is not installed")

CAM = "device.cam-1"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> TestAuthority:
    return TestAuthority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a family that nobody else announces; the device keeps nothing, the edge everything."""
    return copy_bundle(tmp_path_factory.mktemp("bundle") / "bundle", thresholds={"device": 1.0, "edge": 0.0})


@contextmanager
def server(tier: str, bundle: Path, tls: TlsSettings, **changes: object) -> Iterator[Server]:
    """A server in this process, looked after as its command would."""
    settings = ServerSettings(
        bundles=[str(bundle)],
        broker=BrokerSettings(kind="mosquitto", port=0),
        tls=tls,
        interfaces=[LOOPBACK],
        **changes,  # type: ignore[arg-type]
    )
    stop = Stop()
    with Server(tier, settings) as made:  # type: ignore[arg-type]
        thread = threading.Thread(target=made.run, args=(stop, lambda: None))
        thread.start()
        try:
            yield made
        finally:
            stop.set()
            thread.join()


def device(bundle: Path, tls: TlsSettings, broker: str = "") -> Device:
    return Device.open(bundle, DeviceSettings(broker=broker, tls=tls, interfaces=[LOOPBACK], deadline_s=5.0))


def test_answers_come_through_two_tiers(pki: TestAuthority, tmp_path: Path) -> None:
    """Device, edge and cloud, each with its certificate: answers are those of the cloud member computed apart."""
    everything_up = copy_bundle(tmp_path / "bundle", thresholds={"device": 1.0, "edge": 1.0})
    family = Family.load(everything_up)
    with (
        server("cloud", everything_up, pki.tls("cloud.big"), advertise=False) as cloud,
        server("edge", everything_up, pki.tls("edge.kitchen"), upstream=str(cloud.broker.address)) as edge,
        device(everything_up, pki.tls(CAM), str(edge.broker.address)) as asking,
    ):
        assert asking.wait_for_server(20)
        for image in sample_images(5):
            answer = asking.infer(image)
            assert (answer.tier, answer.degraded, answer.reason) == ("cloud", False, answer.reason)
            label, confidence = member_answer(family, "cloud", image)
            assert answer.index == label
            assert answer.confidence == pytest.approx(confidence, abs=1e-4)
        assert edge.node == "edge.kitchen"


@pytest.mark.parametrize("rogue_tls", ["none", "device.insider", "foreign"])
def test_a_rogue_announcement_attracts_nobody(pki: TestAuthority, bundle: Path, tmp_path: Path, rogue_tls: str) -> None:
    """A rogue that announces itself first and says it is ready: no byte of a request reaches it, the real one answers.

    It has no TLS, or a device's certificate of this family (stolen), or a server's of another family.
    """
    family = Family.load(bundle)
    with ExitStack() as stack:
        seen: list[str] = []
        address = stack.enter_context(rogue_broker(pki, tmp_path, rogue_tls, family, seen))
        advert = Node("aaa-nearest", "edge", LOOPBACK, address, ((family.id, family.version),))
        stack.enter_context(Advert(advert, interfaces=[LOOPBACK]))
        asking = stack.enter_context(device(bundle, pki.tls(CAM)))
        assert not asking.wait_for_server(1.5)
        stack.enter_context(server("edge", bundle, pki.tls("edge.kitchen")))
        assert asking.wait_for_server(20)
        answers = [asking.infer(image) for image in sample_images(10)]
        assert {(answer.tier, answer.degraded) for answer in answers} == {("edge", False)}
        assert {answer.timings.hops[0].node for answer in answers} == {"edge.kitchen"}
        assert seen == []


@contextmanager
def rogue_broker(pki: TestAuthority, folder: Path, kind: str, family: Family, seen: list[str]) -> Iterator[int]:
    """A broker that lets anybody in, with a ready server's status; `seen` gets every request. Its port."""
    served = Served(
        family.id, family.version, {split: list(spec.codecs) for split, spec in family.manifest.splits.items()}
    )
    status = frame.pack(NodeStatus("aaa-nearest", "edge", "ready", families=[served]))
    with ExitStack() as stack:
        tls = None
        if kind == "none":
            address = stack.enter_context(Broker(BrokerSettings(kind="mosquitto", port=0))).address
        else:
            authority = TestAuthority(folder / "theirs") if kind == "foreign" else pki
            holder = "edge.kitchen" if kind == "foreign" else kind
            address = stack.enter_context(mosquitto_with(Path(authority.tls(holder).folder), folder))
            if kind == "foreign":
                tls = authority.credentials(holder)
        if kind == "none" or tls is not None:
            everything = [topics.requests("edge", "+", "+", ""), topics.request_to("+", "+", "+", "+")]
            rogue = stack.enter_context(
                Connection(
                    address,
                    "rogue",
                    on_message=lambda topic, _: seen.append(topic),
                    subscriptions=everything,
                    tls=tls,
                )
            )
            assert rogue.wait_connected(10)
            rogue.publish(topics.status("aaa-nearest"), status, retain=True)
        yield address.port


def test_an_unenrolled_device_does_not_follow_an_announcement_off_the_machine(bundle: Path) -> None:
    """Without TLS, and not told otherwise, a server beyond loopback is not asked, and the answer says why."""
    family = Family.load(bundle)
    far = Node("far", "edge", "192.0.2.77", 1883, ((family.id, family.version),))
    asking = Device.open(bundle, DeviceSettings(deadline_s=0.5))
    with asking:
        assert asking._uplink is not None
        browser = asking._uplink._browser
        assert browser is not None
        browser._nodes["far"] = far  # what a browser on the LAN would have heard
        wait_until(lambda: "192.0.2.77" in asking.infer(sample_images(1)[0]).reason, 10)
        answer = asking.infer(sample_images(1)[0])
    assert answer.degraded
    assert "no TLS" in answer.reason
    with pytest.raises(SettingsError, match=r"192\.0\.2\.77 is beyond loopback"):
        Device.open(bundle, DeviceSettings(broker="192.0.2.77")).__enter__()


def test_revocation_takes_effect_in_a_running_system(tmp_path: Path, bundle: Path) -> None:
    """One device is revoked: its answers become local within seconds, the other goes on, nobody restarts anything."""
    own = TestAuthority(tmp_path)
    with (
        server("edge", bundle, own.tls("edge.kitchen")) as edge,
        device(bundle, own.tls(CAM), str(edge.broker.address)) as good,
        device(bundle, own.tls("device.lost"), str(edge.broker.address)) as lost,
    ):
        image = sample_images(1)[0]
        for each in (good, lost):
            assert each.wait_for_server(20)
            assert each.infer(image).tier == "edge"
        own.revoke("device.lost", "edge.kitchen")
        wait_until(lambda: lost.infer(image, deadline_s=0.5).tier == "device", 20)
        wait_until(lambda: good.infer(image).tier == "edge", 20)
        time.sleep(1)
        assert [lost.infer(image, deadline_s=0.5).tier for _ in range(3)] == ["device"] * 3


def test_a_request_in_another_s_name_is_not_answered(bundle: Path) -> None:
    """On a broker without an access list the server itself compares the topic with the request."""
    family = Family.load(bundle)
    codec = family.codec("s1")
    with server("edge", bundle, TlsSettings(), advertise=False) as edge:
        replies: list[bytes] = []
        with (
            Link(edge.broker.address, "honest") as honest,
            Connection(
                edge.broker.address,
                "victim",
                on_message=lambda _, data: replies.append(bytes(data)),
                subscriptions=[topics.reply("victim")],
            ) as victim,
        ):
            assert honest.wait_connected(10)
            assert victim.wait_connected(10)
            payload = codec.encode(np.zeros(codec.shape, np.float32))
            forged = Request(os.urandom(16), "victim", family.id, family.version, "s1", codec.name, 5000.0)
            honest.connection.publish(topics.request("edge", family.id, "s1", "honest"), frame.pack(forged, payload))
            genuine = Request(os.urandom(16), "honest", family.id, family.version, "s1", codec.name, 5000.0)
            topic = topics.request("edge", family.id, "s1", "honest")
            assert honest.request(topic, genuine, payload).result(10).reply.id == genuine.id
        assert replies == []
        assert edge.workers.counts["failed:frame"] == 1


def test_a_known_id_is_no_key_to_another_s_reply(bundle: Path) -> None:
    """Who repeats another client's request id gets an answer to its own features, not the remembered one."""
    family = Family.load(bundle)
    codec = family.codec("s1")
    payloads = [codec.encode(np.full(codec.shape, value, np.float32)) for value in (0.0, 4.0)]
    with server("edge", bundle, TlsSettings(), advertise=False) as edge:
        with Link(edge.broker.address, "first") as first, Link(edge.broker.address, "second") as second:
            got = []
            same = os.urandom(16)
            for link, payload in ((first, payloads[0]), (second, payloads[1])):
                assert link.wait_connected(10)
                request = Request(same, link.client, family.id, family.version, "s1", codec.name, 5000.0)
                topic = topics.request("edge", family.id, "s1", link.client)
                got.append(link.request(topic, request, payload).result(10).reply)
        assert got[0].confidence != got[1].confidence
        assert edge.workers.counts["repeated"] == 0


def test_features_are_never_logged(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With every logger at DEBUG, nothing of a request's payload appears on device or server, answered or refused."""
    caplog.set_level(logging.DEBUG, logger="kinflow")
    family = Family.load(bundle)
    sent: list[bytes] = []
    with (
        server("edge", bundle, TlsSettings(), advertise=False) as edge,
        device(bundle, TlsSettings(), str(edge.broker.address)) as asking,
        Connection(
            edge.broker.address,
            "tap",
            on_message=lambda _, data: sent.append(bytes(data)),
            subscriptions=[topics.request_to(edge.node, family.id, "+", "+")],
        ) as tap,
    ):
        assert asking.wait_for_server(20)
        assert tap.wait_connected(10)
        for image in sample_images(3):
            asking.infer(image)
        wait_until(lambda: len(sent) >= 3)
        sent = [data for data in sent if isinstance(frame.unpack(data).message, Request)]
        payload = frame.unpack(sent[0]).payload
        damaged = frame.pack(frame.unpack(sent[0]).message, payload[:-1])  # refused: it does not decode
        tap.publish(topics.request("edge", Family.load(bundle).id, "s1", "tap"), damaged)
        tap.publish(topics.request("edge", Family.load(bundle).id, "s1", "tap"), sent[0][:-1])
        wait_until(lambda: "refused" in caplog.text)
    assert len(caplog.records) > 5
    for data in sent[:3]:
        payload = frame.unpack(data).payload
        piece = payload[8:20]
        for shown in (piece.hex(), repr(piece)[2:-1], str(list(piece))[1:-1], piece.hex(" ")):
            assert shown not in caplog.text


REFUSALS = {
    "a LAN address": (["edge", "BUNDLE", "--listen", "192.0.2.5", "--port", "0"], "insecure_lan"),
    "every address": (["cloud", "BUNDLE", "--listen", "0.0.0.0", "--port", "0"], "insecure_lan"),
    "a broker elsewhere": (["edge", "BUNDLE", "--broker", "192.0.2.5:1883"], "insecure_lan"),
    "an upstream elsewhere": (["edge", "BUNDLE", "--port", "0", "--upstream", "192.0.2.5"], "insecure_lan"),
    "a device's certificate": (["edge", "BUNDLE", "--port", "0", "--tls", CAM], "not a server's"),
    "another tier's": (["cloud", "BUNDLE", "--port", "0", "--tls", "edge.kitchen"], "needs cloud.NAME"),
    "another name": (["edge", "BUNDLE", "--tls", "edge.kitchen", "--node", "attic"], "leave node out"),
    "no group": (["edge", "BUNDLE", "--tls", "edge.kitchen", "--broker", "192.0.2.5"], "broker.group"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_server_that_would_be_open_does_not_start(pki: TestAuthority, bundle: Path, name: str) -> None:
    """Status 2 and one line that says what is needed; nothing was started."""
    words, wanted = REFUSALS[name]
    for identity in (CAM, "edge.kitchen"):
        pki.tls(identity)
    with running(*(str(bundle) if word == "BUNDLE" else word for word in words), cwd=pki.folder) as run:
        assert run.wait(60) == 2
        assert run.gone()
        assert len(run.err) == 1
        assert wanted in run.err[0]
