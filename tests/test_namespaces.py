"""Three machines on one LAN, each a network namespace: zeroconf and MQTT cross a real bridge."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import ROOT
from kinflow.family import Family
from lan import Host, ip, three_hosts, why_not
from system_fixtures import SAMPLES, copy_bundle, halving_threshold, member_answer, running, sample_images


@pytest.fixture(scope="module")
def lan() -> Iterator[list[Host]]:
    """Device, edge and cloud."""
    if why_not_here := why_not():
        pytest.skip(why_not_here)
    with three_hosts() as hosts:
        yield hosts


pytestmark = pytest.mark.root


def test_three_machines_on_a_bridge(lan: list[Host], tmp_path: Path) -> None:
    """Nobody is told an address but the edge its cloud: the device finds its edge, and all answers are right."""
    device, edge, cloud = lan
    # The device never keeps an answer, the edge keeps half of them.
    bundle = copy_bundle(tmp_path / "bundle", thresholds={"device": 1.0, "edge": halving_threshold(60)})
    with ExitStack() as stack:
        above = stack.enter_context(
            running(
                "cloud",
                str(bundle),
                "--listen",
                cloud.address,
                "--port",
                "1884",
                "--insecure-lan",
                "--json",
                prefix=cloud.prefix,
            )
        )
        assert above.ready()["broker"] == f"{cloud.address}:1884"
        upstream = f"{cloud.address}:1884"
        near = stack.enter_context(
            running(
                "edge",
                str(bundle),
                "--upstream",
                upstream,
                "--listen",
                edge.address,
                "--insecure-lan",
                "--json",
                prefix=edge.prefix,
            )
        )
        assert near.ready()["broker"] == f"{edge.address}:1883"
        # Not before the edge server has found its upstream: what came earlier would be degraded.
        with running("discover", "--json", "--timeout", "3", prefix=device.prefix) as found:
            assert found.wait(60) == 0, found.err[-3:]
            nodes = {node["address"]: node for node in json.loads("\n".join(found.out))}
        assert set(nodes) == {f"{edge.address}:1883", upstream}
        assert {node["state"] for node in nodes.values()} == {"ready"}
        with running(
            "run",
            str(SAMPLES),
            "--bundle",
            str(bundle),
            "--limit",
            "60",
            "--deadline",
            "5",
            "--wait",
            "20",
            "--insecure-lan",
            "--json",
            prefix=device.prefix,
        ) as run:
            assert run.wait(90) == 0, run.err[-5:]
            answers = [json.loads(line) for line in run.out]
    assert len(answers) == 60
    assert [answer["reason"] for answer in answers if answer["degraded"]] == []
    tiers = [answer["tier"] for answer in answers]
    assert set(tiers) == {"edge", "cloud"}
    family = Family.load(bundle)
    for answer, image in zip(answers, sample_images(60), strict=True):
        label, confidence = member_answer(family, answer["tier"], image)
        assert answer["label"] == family.labels[label]
        assert answer["confidence"] == pytest.approx(confidence, abs=1e-4)


def test_a_server_that_binds_every_address_is_found(lan: list[Host], tmp_path: Path) -> None:
    """`--listen 0.0.0.0` announces the LAN's address, not loopback's."""
    device, edge, _ = lan
    bundle = copy_bundle(tmp_path / "bundle", thresholds={"device": 1.0, "edge": 0.0})
    with running(
        "edge", str(bundle), "--listen", "0.0.0.0", "--port", "1885", "--insecure-lan", "--json", prefix=edge.prefix
    ) as near:
        near.ready()
        with running(
            "run",
            str(SAMPLES),
            "--bundle",
            str(bundle),
            "--limit",
            "5",
            "--deadline",
            "5",
            "--wait",
            "20",
            "--insecure-lan",
            "--json",
            prefix=device.prefix,
        ) as run:
            assert run.wait(90) == 0, run.err[-5:]
            assert {json.loads(line)["tier"] for line in run.out} == {"edge"}


def test_the_lan_breaks_and_heals(lan: list[Host], tmp_path: Path) -> None:
    """The cable is pulled: `kinflow run` goes on answering by itself, within each deadline, and says so."""
    device, edge, _ = lan
    bundle = copy_bundle(tmp_path / "bundle", thresholds={"device": 1.0, "edge": 0.0})
    with running(
        "edge", str(bundle), "--listen", edge.address, "--port", "1886", "--insecure-lan", "--json", prefix=edge.prefix
    ) as near:
        near.ready()
        with running(
            "run",
            str(SAMPLES),
            str(SAMPLES),
            str(SAMPLES),
            "--bundle",
            str(bundle),
            "--deadline",
            "0.2",
            "--wait",
            "20",
            "--insecure-lan",
            "--json",
            "--limit",
            "3000",
            prefix=device.prefix,
        ) as run:
            run.line('"tier": "edge"', 60)
            ip("-n", edge.name, "link", "set", "eth0", "down")
            try:
                run.line('"tier": "device"', 30)
            finally:
                ip("-n", edge.name, "link", "set", "eth0", "up")
            answers = [json.loads(line) for line in list(run.out)]
    local = [answer for answer in answers if answer["tier"] == "device"]
    assert all(answer["degraded"] and answer["reason"] for answer in local)
    assert max(answer["total_ms"] for answer in answers) < 200 + 500


def test_the_operator_s_page_word_for_word(lan: list[Host], tmp_path: Path) -> None:
    """docs/servers.md from nothing to a TLS LAN: its own lines with this LAN's addresses, then a revocation."""
    pytest.importorskip("cryptography", reason="certificates are made with it: pip install 'kinflow[pki]'")
    device, edge, cloud = lan
    page = (ROOT / "docs/servers.md").read_text(encoding="utf-8")
    section = page.split("\n## A LAN with TLS\n")[1].split("\n## ")[0]
    lines = {
        words[1]: words
        for line in re.findall(r"`(kinflow (?:cloud|edge|pull|run) [^`]+)`", section)[:4]
        if (words := line.replace("192.0.2.10", cloud.address).split())
    }
    # As on three machines, but for one working folder; the device keeps nothing, so every answer needs the servers.
    copy_bundle(
        tmp_path / "families/fashion/bundle",
        family="fashion",
        thresholds={"device": 1.0, "edge": halving_threshold(20)},
    )
    (tmp_path / "word").write_text("a passphrase for tests")
    for line in re.findall(r"^kinflow (pki (?:init|issue|enrol) .*|pki init)$", section, re.MULTILINE):
        extra = ["--at", str(tmp_path / "device.cam-1")] if "enrol" in line else []
        kinflow(tmp_path, *line.split(), *extra, "--passphrase-file", "word")
    settings = ["--settings", str(tmp_path / "device.cam-1/device.toml")]
    ask = [
        "run",
        str(SAMPLES),
        *lines["run"][3:],
        *settings,
        "--limit",
        "20",
        "--deadline",
        "5",
        "--wait",
        "20",
        "--json",
    ]
    with (
        running(*lines["cloud"][1:], "--json", cwd=tmp_path, prefix=cloud.prefix) as above,
        running(*lines["edge"][1:], "--json", cwd=tmp_path, prefix=edge.prefix) as near,
    ):
        assert (above.ready()["tls"], above.ready()["insecure"]) == (True, "")
        assert near.ready()["node"] == "edge.kitchen"
        with running(*lines["pull"][1:], *settings, "--wait", "20", cwd=tmp_path, prefix=device.prefix) as pull:
            assert pull.wait(60) == 0, pull.err
        with running(*ask, cwd=tmp_path, prefix=device.prefix) as run:
            assert run.wait(90) == 0, run.err[-5:]
            answers = [json.loads(line) for line in run.out]
        assert [answer["reason"] for answer in answers if answer["degraded"]] == []
        assert {answer["tier"] for answer in answers} == {"edge", "cloud"}
        # A stranger on the same LAN hears the announcement, and gets nothing without a certificate.
        with running("discover", "--json", "--timeout", "3", prefix=device.prefix) as found:
            assert found.wait(60) == 0
            assert {node["state"] for node in json.loads("\n".join(found.out))} == {"unreachable"}
        kinflow(tmp_path, "pki", "revoke", "device.cam-1", "--passphrase-file", "word")
        for server in ("edge.kitchen", "cloud.big"):
            shutil.copy(tmp_path / "pki/crl.pem", tmp_path / server / "crl.pem")
        near.line('"broker-restarted"', 30)
        with running(*ask, "--limit", "2", "--wait", "3", cwd=tmp_path, prefix=device.prefix) as run:
            assert run.wait(60) == 0
            assert {json.loads(line)["tier"] for line in run.out} == {"device"}


def kinflow(folder: Path, *words: str) -> None:
    with running(*words, cwd=folder) as run:
        assert run.wait(60) == 0, run.err


def test_a_server_without_tls_says_so_to_everybody(lan: list[Host], tmp_path: Path) -> None:
    """`--insecure-lan`: the first line, the log and the status that `kinflow discover` shows."""
    device, edge, _ = lan
    bundle = copy_bundle(tmp_path / "bundle")
    words = ["edge", str(bundle), "--listen", edge.address, "--port", "1887", "--json"]
    with running(*words, prefix=edge.prefix) as refused:
        assert refused.wait(60) == 2
        assert "insecure_lan" in refused.err[-1]
    with running(*words, "--insecure-lan", prefix=edge.prefix) as near:
        assert "no TLS" in near.ready()["insecure"]
        near.line("WARNING.*no TLS")
        with running("discover", "--json", "--timeout", "3", prefix=device.prefix) as found:
            assert found.wait(60) == 0
            (node,) = json.loads("\n".join(found.out))
            assert (node["state"], node["insecure"]) == ("ready", True)
