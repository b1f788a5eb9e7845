"""Text servers as real processes on real brokers: escalation, failover, and what a server's end costs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from brokers import KINDS, wait_until
from freezing import freeze
from kinflow import topics
from kinflow.errors import FamilyMismatch, ServerFailed, SettingsError
from kinflow.fleet import Fleet, ServerProcess
from kinflow.link import Link
from kinflow.messages import Verdict, Verify
from kinflow.mqtt import BrokerAddress
from kinflow.settings import BrokerSettings, ServerSettings
from kinflow.text.family import TextFamily
from kinflow.text.manifest import IDS
from kinflow.text.sampling import GREEDY, Sampling
from kinflow_edge.server import Server
from text_client import Writer, copy_tiny, plain

SAMPLED = Sampling(0.9, 0.95, 7)
PROMPT = [5, 17, 99, 230, 41, 8]


@pytest.fixture(autouse=True)
def _litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed leaves its broker's folder: not in the machine's /tmp."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(scope="module")
def family(tiny: Path) -> TextFamily:
    return TextFamily.load(tiny)


class Asker:
    """A link to one server, and writers that use it."""

    def __init__(self, family: TextFamily, broker: str, node: str) -> None:
        self.family, self.node = family, node
        self.link = Link(BrokerAddress.parse(broker), f"asker-{os.urandom(4).hex()}")

    def ask(self, verify: Verify, payload: bytes) -> Verdict:
        topic = topics.request_to(self.node, verify.family, verify.split, verify.client)
        return self.link.verify(topic, verify, payload).result(verify.deadline_ms / 1e3 + 5).reply

    def writer(self, **changes: object) -> Writer:
        return Writer(self.family, self.link.client, self.ask, **changes)  # type: ignore[arg-type]


@contextmanager
def asking(family: TextFamily, broker: str, node: str) -> Iterator[Asker]:
    asker = Asker(family, broker, node)
    with asker.link:
        assert asker.link.wait_connected(10)
        wait_until(lambda: node in asker.link.nodes and asker.link.nodes[node].state == "ready")
        yield asker


def at(family: TextFamily, server: ServerProcess) -> contextmanager[Asker]:
    return asking(family, server.broker, server.ready["node"])


@contextmanager
def pair(tiny: Path) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    with Fleet([tiny]) as fleet:
        yield fleet.start_cloud_and_edge("--no-advertise")


def knows_its_cloud(asker: Asker) -> bool:
    return not asker.writer(drafts=0).begin(PROMPT).degraded


def test_a_ready_server_has_verified_something(tiny: Path, family: TextFamily) -> None:
    """Its status says what it takes, its health comes from a real verification, its metrics count generations."""
    with Fleet([tiny]) as fleet:
        server = fleet.start("edge", "--member", "cloud", "--no-advertise")
        with at(family, server) as asker:
            (served,) = asker.link.nodes[asker.node].families
            assert (served.family, served.version) == (family.id, family.version)
            assert served.splits == {IDS: [IDS], "s1": ["int8", "f16"], "s2": ["int8", "f16"]}
            writer = asker.writer(sampling=SAMPLED)
            assert writer.write(PROMPT, 40) == plain(family, PROMPT, 40, SAMPLED, codecs={"s1": "int8"})
            assert {verdict.tier for verdict in writer.verdicts} == {"edge"}
            assert {verdict.exit for verdict in writer.verdicts} == {"cloud"}
            said = urlopen(f"http://{server.ready['http']}/metrics").read().decode()
            assert "kinflow_sessions 2.0" in said  # its own test's, and this one
            assert f'kinflow_requests_total{{outcome="served"}} {len(writer.verdicts)}.0' in said
            assert urlopen(f"http://{server.ready['http']}/ready").status == 200
            with pytest.raises(ServerFailed, match="mismatch"):
                asker.writer(exit="edge").begin(PROMPT)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("codec", "exact"), [("int8", False), ("f16", True)], ids=["family", "exact"])
def test_an_edge_server_passes_the_clouds_verdict_down(
    tiny: Path, family: TextFamily, codec: str, exact: bool, sampling: Sampling
) -> None:
    """The cloud's text, through both splits, with a hop for each server."""
    with pair(tiny) as (cloud, edge), at(family, edge) as asker:
        wait_until(lambda: knows_its_cloud(asker))
        writer = asker.writer(codec=codec, exact=exact, sampling=sampling)
        codecs = {} if exact else {"s1": codec, "s2": codec}
        expected = plain(family, PROMPT, 50, sampling, codecs=codecs, device="float" if exact else "int8")
        assert writer.write(PROMPT, 50) == expected
        last = writer.verdicts[-1]
        assert (last.tier, last.exit, last.node, last.degraded) == ("cloud", "cloud", cloud.ready["node"], False)
        assert [hop.node for hop in last.hops] == [edge.ready["node"], cloud.ready["node"]]
        assert last.hops[0].bytes_up > last.hops[1].bytes_up == 0
        if not exact:
            assert {(verdict.passes, verdict.layer_tokens) for verdict in writer.verdicts[1:]} == {(2, 4 * 4)}


def test_a_killed_cloud_costs_the_text_its_exit_and_no_more(tiny: Path, family: TextFamily) -> None:
    """kill -9 in the middle: verdicts of the edge's own exit from then on, degraded, exactly what it would say."""
    with pair(tiny) as (cloud, edge), at(family, edge) as asker:
        wait_until(lambda: knows_its_cloud(asker))
        writer = asker.writer(deadline_ms=5000.0)
        writer.write(PROMPT, 12)
        os.kill(cloud.pid, signal.SIGKILL)
        cloud.process.wait(10)
        came = len(writer.verdicts)
        while len(writer.tokens) < len(PROMPT) + 40:
            start = time.monotonic()
            writer.step()
            assert time.monotonic() - start < 10
        after = writer.verdicts[came:]
        assert all((verdict.tier, verdict.exit, verdict.degraded) == ("edge", "edge", True) for verdict in after[1:])
        assert after[-1].reason
        known = len(PROMPT) + sum(verdict.accepted + 1 for verdict in writer.verdicts[: came + 1])
        said = writer.tokens[len(PROMPT) : known]
        rest = plain(family, PROMPT, 20, known=said, exit="edge", codecs={"s1": "int8"})
        assert writer.tokens[known : known + 20] == rest


def test_a_silent_cloud_is_not_waited_for_to_the_end(tiny: Path, family: TextFamily) -> None:
    """Stopped, and still announced as ready: the edge decides in time; when it speaks again, it is asked again."""
    with pair(tiny) as (cloud, edge), at(family, edge) as asker:
        wait_until(lambda: knows_its_cloud(asker))
        writer = asker.writer(deadline_ms=1500.0)
        writer.write(PROMPT, 12)
        freeze(cloud.pid)
        try:
            came = len(writer.verdicts)
            for _ in range(5):
                writer.step()
            silent = writer.verdicts[came:]
            assert all((verdict.exit, verdict.degraded) == ("edge", True) for verdict in silent)
            assert silent[0].reason.startswith("timeout")
            # After three silences nobody waits any more, whether the connection is being made anew just then or not.
            assert "left alone" in silent[4].reason or "no connection" in silent[4].reason
        finally:
            os.kill(cloud.pid, signal.SIGCONT)
        wait_until(lambda: not writer.step().degraded, 30)


def test_a_cloud_that_comes_back_is_brought_up_to_date(tiny: Path, family: TextFamily) -> None:
    """A restarted server knows nothing of the session: the edge sends it all features, and its verdicts come again."""
    with pair(tiny) as (cloud, edge), at(family, edge) as asker:
        wait_until(lambda: knows_its_cloud(asker))
        writer = asker.writer(deadline_ms=5000.0)
        writer.write(PROMPT, 12)
        os.kill(cloud.pid, signal.SIGKILL)
        cloud.process.wait(10)
        for _ in range(3):
            writer.step()
        assert writer.verdicts[-1].degraded
        with Fleet([tiny]) as again:
            again.start("cloud", "--no-advertise", "--port", cloud.broker.rpartition(":")[2])
            wait_until(lambda: not writer.step().degraded, 30)
            known = list(writer.tokens)
            writer.write(PROMPT, len(known) - len(PROMPT) + 12)
            expected = plain(family, PROMPT, 12, known=known[len(PROMPT) :], codecs={"s1": "int8", "s2": "int8"})
            assert writer.tokens[len(known) : len(known) + 12] == expected


def test_another_cloud_takes_over(tiny: Path, family: TextFamily) -> None:
    """Of two at one broker the one that holds the session is killed: the other goes on with the same text."""
    with Fleet([tiny]) as fleet:
        hub = fleet.start("edge", "--member", "edge", "--no-advertise", name="hub")
        clouds = [fleet.start("cloud", "--broker", hub.broker, "--no-advertise", name=name) for name in ("one", "two")]
        edge = fleet.start("edge", "--upstream", hub.broker, "--no-advertise")
        with at(family, edge) as asker:
            wait_until(lambda: knows_its_cloud(asker))
            expected = plain(family, PROMPT, 60, codecs={"s1": "int8", "s2": "int8"})
            writer = asker.writer()
            writer.write(PROMPT, 12)
            (holder,) = {verdict.node for verdict in writer.verdicts}
            victim = next(cloud for cloud in clouds if cloud.ready["node"] == holder)
            os.kill(victim.pid, signal.SIGKILL)
            assert writer.write(PROMPT, 60) == expected
            assert not any(verdict.degraded for verdict in writer.verdicts)
            assert {verdict.node for verdict in writer.verdicts} == {cloud.ready["node"] for cloud in clouds}


def test_a_draining_server_answers_what_it_holds(tiny: Path, family: TextFamily) -> None:
    """SIGTERM in the middle of a text: verdicts come until its clients have moved, and nothing is left unanswered."""
    with Fleet([tiny]) as fleet:
        server = fleet.start("cloud", "--no-advertise")
        with at(family, server) as asker:
            writer = asker.writer()
            writer.write(PROMPT, 8)
            server.process.terminate()
            wait_until(lambda: asker.link.nodes[asker.node].state == "draining")
            writer.step()
            assert server.process.wait(10) == 0
            assert writer.tokens[len(PROMPT) :][:8] == plain(family, PROMPT, 8, codecs={"s1": "int8"})


def test_a_server_serves_images_and_texts(tiny: Path, bundle: Path, tmp_path: Path) -> None:
    """Each task has a worker of its own; together they are one server, with one status."""
    text = copy_tiny(tiny, tmp_path / "text", id=f"text-{os.urandom(4).hex()}")
    settings = ServerSettings(
        bundles=[str(bundle), str(text)],
        broker=BrokerSettings(kind=KINDS[0], port=0),
        advertise=False,
        member="cloud",
        node=f"n-{os.urandom(4).hex()}",
    )
    with Server("edge", settings) as server:
        assert len(list(server.workers)) == 2
        family = TextFamily.load(text)
        assert {served.family for served in server.workers.families} == {family.id, "synthetic"}
        asker = Asker(family, str(server.broker.address), server.node)
        with asker.link:
            assert asker.link.wait_connected(10)
            assert asker.writer().write(PROMPT, 8) == plain(family, PROMPT, 8, codecs={"s1": "int8"})
            assert server.workers.counts["served"] > 1


def test_a_member_without_a_split_is_refused(tiny: Path) -> None:
    """The device's member begins at the ids; nothing is above the largest one."""
    broker = BrokerSettings(kind=KINDS[0], port=0)
    with pytest.raises(FamilyMismatch, match="begins at the token ids"):
        Server("edge", ServerSettings(bundles=[str(tiny)], member="device", broker=broker))
    with pytest.raises(SettingsError, match="nothing of tiny is above"):
        Server("cloud", ServerSettings(bundles=[str(tiny)], upstream="127.0.0.1:9", broker=broker)).__enter__()
