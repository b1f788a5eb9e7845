"""Generated text against plain decoding, with real servers: every mode, whatever is drafted, killed or lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kinflow.bundle import MANIFEST
from kinflow.device import Device
from kinflow.errors import BundleError, InputError
from kinflow.fleet import Fleet, ServerProcess
from kinflow.settings import DeviceSettings, TextSettings
from kinflow.text.device import TextDevice
from kinflow.text.drafter import DeviceModel, Drafter
from kinflow.text.family import TextFamily
from kinflow.text.generation import Generation
from kinflow.text.sampling import GREEDY, Sampling, choose
from kinflow.text.summary import Mode, Token
from kinflow_bench.reference import Reference
from kinflow_builder.text.tiny import write_tiny

LENGTH = 40
SERVER = ("--member", "cloud", "--no-advertise")
QUESTIONS = ("Is it late?", "Name a bird.", "1, 2, 3,")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of six layers whose exits often agree."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def family(bundle: Path) -> TextFamily:
    return TextFamily.load(bundle)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ServerProcess]:
    """One server that has all layers."""
    with Fleet([bundle]) as fleet:
        yield fleet.start("edge", *SERVER)


@pytest.fixture(scope="module")
def device(bundle: Path, server: ServerProcess) -> Iterator[TextDevice]:
    with TextDevice.open(bundle, DeviceSettings(broker=server.broker)) as device:
        assert device.wait_for_server(20)
        yield device


def prompt(device: TextDevice, question: str) -> list[int]:
    return device.tokenizer.chat([{"role": "user", "content": question}])


def reference(family: TextFamily, mode: Mode) -> Reference:
    """What the mode promises: the composed model, or the largest member alone."""
    return Reference(family, "int8", family.codec("s1", "int8")) if mode == "family" else Reference(family)


def plain(family: TextFamily, mode: Mode, ids: list[int], sampling: Sampling = GREEDY) -> list[int]:
    tokens = reference(family, mode).decode(ids, LENGTH, sampling).tokens
    return [token for token in tokens if token not in family.manifest.stop_tokens]


def ids(generation: Generation) -> list[int]:
    return [token.id for token in generation]


@pytest.mark.parametrize("mode", ["family", "exact"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 1.0, 11), Sampling(1.0, 0.6, 12)])
def test_text_is_the_references(device: TextDevice, family: TextFamily, mode: Mode, sampling: Sampling) -> None:
    """Token for token what plain decoding gives, although drafts stand and fall on the way."""
    temperature, top_p, seed = sampling.temperature, sampling.top_p, sampling.seed
    drafted = accepted = refused = 0
    for question in QUESTIONS:
        asked = prompt(device, question)
        generation = device.continue_from(
            asked, max_tokens=LENGTH, mode=mode, temperature=temperature, top_p=top_p, seed=seed
        )
        assert ids(generation) == plain(family, mode, asked, sampling)
        summary = generation.summary
        assert not summary.degraded
        assert summary.unverified == 0
        assert summary.tokens["device"] <= summary.accepted
        # In the place of each refused draft the server says its own token; the text may end before it.
        assert summary.refused <= summary.count - summary.tokens["device"] + 1
        drafted, accepted = drafted + summary.drafted, accepted + summary.accepted
        refused += summary.refused
    assert 0 < accepted < drafted
    assert 0 < refused <= drafted - accepted


def test_drafts_change_costs_not_text(device: TextDevice) -> None:
    """Without drafts: the same text, and a verification for every token."""
    asked = prompt(device, QUESTIONS[0])
    with_drafts = device.continue_from(asked, max_tokens=LENGTH, mode="family")
    without = device.continue_from(asked, max_tokens=LENGTH, mode="family", max_drafts=0)
    assert ids(with_drafts) == ids(without)
    assert without.summary.drafted == 0
    assert without.summary.verifications == LENGTH
    assert with_drafts.summary.verifications < LENGTH


def test_samples_follow_the_reference(device: TextDevice, family: TextFamily) -> None:
    """Over many seeds the second token is distributed as plain decoding's (chi-square on its likeliest values)."""
    from scipy.stats import chisquare

    asked, temperature, runs = prompt(device, QUESTIONS[1]), 0.5, 300
    composed = reference(family, "family")
    first = composed.decode(asked, 1, GREEDY).tokens[0]
    logits = composed.logits([*asked, first])
    weights = np.exp((logits - logits.max()).astype(float) / temperature)
    expected = weights / weights.sum()
    counts = np.zeros(len(expected))
    for seed in range(runs):
        generation = device.continue_from(
            [*asked, first], max_tokens=2, mode="family", temperature=temperature, seed=seed
        )
        counts[next(iter(generation)).id] += 1
    likely = expected * runs >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum()) * runs
    assert chisquare(observed, wanted).pvalue > 0.01


def test_tokens_say_who_said_them(device: TextDevice) -> None:
    """Tiers, probabilities, pieces of text and the summary fit together."""
    generation = device.generate(QUESTIONS[0], max_tokens=LENGTH)
    tokens = list(generation)
    summary = generation.summary
    assert {tier: sum(token.tier == tier for token in tokens) for tier in summary.tokens} == summary.tokens
    assert summary.tokens["device"] > 0
    assert summary.tokens["edge"] > 0
    assert all(0 < token.probability < 1 and token.verified for token in tokens)
    assert summary.finish == "length"
    whole = device.tokenizer.decode([token.id for token in tokens])
    assert whole.startswith("".join(token.text for token in tokens))
    assert 0 < summary.first_token_s <= summary.seconds


def test_confident_tokens_leave_unverified(bundle: Path, server: ServerProcess, tmp_path: Path) -> None:
    """At the certificate's threshold the device's own token leaves, below it the composed model's; no holes stay."""
    sure = tmp_path / "sure"
    sure.mkdir()
    for path in bundle.iterdir():
        (sure / path.name).symlink_to(path) if path.name != MANIFEST else None
    manifest = json.loads((bundle / MANIFEST).read_text())
    certificate = {"threshold": 0.4, "epsilon": 0.01, "delta": 0.05, "n": 1000, "kept_share": 0.5}
    manifest["exits"]["device"]["certificate"] = certificate
    (sure / MANIFEST).write_text(json.dumps(manifest))
    family = TextFamily.load(_copied(sure))
    with TextDevice.open(family.path, DeviceSettings(broker=server.broker)) as device:
        assert device.wait_for_server(20)
        asked = prompt(device, QUESTIONS[2])
        generation = device.continue_from(asked, max_tokens=LENGTH, mode="confident")
        tokens = list(generation)
    assert _confident_reference(family, asked, 0.4) == [(token.id, token.verified) for token in tokens]
    assert 0 < generation.summary.unverified < LENGTH
    assert generation.summary.verifications == LENGTH - generation.summary.unverified


def _copied(folder: Path) -> Path:
    """Without links: a bundle's files may not lie outside of it."""
    for path in folder.iterdir():
        if path.is_symlink():
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
    return folder


def _confident_reference(family: TextFamily, asked: list[int], threshold: float) -> list[tuple[int, bool]]:
    """Plain: every position's two opinions, computed apart."""
    from kinflow.confidence import read

    composed = reference(family, "family")
    drafter = Drafter(DeviceModel.open(family, "int8", 1))
    drafter.begin(asked)
    text, said = list(asked), []
    while len(said) < LENGTH:
        sure = read(drafter.logits, family.manifest.exits["device"].temperature).confidence >= threshold
        token = choose(drafter.logits if sure else composed.logits(text, len(asked)), GREEDY, len(text)).token
        text.append(token)
        said.append((token, not sure))
        drafter.feed(token)
    return said


def test_local_needs_nobody(bundle: Path) -> None:
    """Mode `local`, and no offload: the device's own text, not degraded, nothing sent."""
    with TextDevice.open(bundle, DeviceSettings(offload=False)) as device:
        asked = prompt(device, QUESTIONS[0])
        local = device.continue_from(asked, max_tokens=10, mode="local")
        switched_off = device.continue_from(asked, max_tokens=10)
        assert ids(local) == ids(switched_off)
    assert local.summary.unverified == 10
    assert not local.summary.degraded
    assert local.summary.bytes_up == 0


def test_killed_server_is_replaced_without_a_token_lost(bundle: Path, family: TextFamily) -> None:
    """kill -9 of the serving one in mid-text: the other one goes on, and the text is the same."""
    with Fleet([bundle]) as fleet:
        servers = [fleet.start("edge", *SERVER, name=name) for name in ("one", "two")]
        brokers = ",".join(server.broker for server in servers)
        with TextDevice.open(bundle, DeviceSettings(broker=brokers)) as device:
            assert device.wait_for_server(20)
            asked = prompt(device, QUESTIONS[0])
            generation = device.continue_from(asked, max_tokens=LENGTH, mode="family")
            said: list[Token] = []
            for token in generation:
                said.append(token)
                if len(said) == LENGTH // 2:
                    serving = next(s for s in servers if s.ready["node"] == generation.summary.servers[-1])
                    os.kill(serving.pid, signal.SIGKILL)
    assert [token.id for token in said] == plain(family, "family", asked)
    assert len(set(generation.summary.servers)) == 2
    assert not generation.summary.degraded
    assert all(token.verified for token in said)


def test_without_any_server_the_device_goes_on_and_says_so(bundle: Path, family: TextFamily) -> None:
    """When the only server dies the rest is local: unverified, degraded, with a reason; nothing is missing."""
    with Fleet([bundle]) as fleet:
        server = fleet.start("edge", *SERVER)
        with TextDevice.open(bundle, DeviceSettings(broker=server.broker)) as device:
            assert device.wait_for_server(20)
            asked = prompt(device, QUESTIONS[1])
            generation = device.continue_from(asked, max_tokens=LENGTH, mode="family")
            said: list[Token] = []
            for token in generation:
                said.append(token)
                if len(said) == LENGTH // 2:
                    os.kill(server.pid, signal.SIGKILL)
    assert len(said) == LENGTH
    half = plain(family, "family", asked)[: LENGTH // 2]
    assert [token.id for token in said[: LENGTH // 2]] == half
    assert not said[-1].verified
    assert generation.summary.degraded
    assert generation.summary.reason


def test_forgotten_session_is_brought_up_to_date(device: TextDevice, family: TextFamily) -> None:
    """A server that lost the session gets it again in one request, and the text goes on."""
    asked = prompt(device, QUESTIONS[2])
    generation = device.continue_from(asked, max_tokens=LENGTH, mode="family")
    said = []
    for token in generation:
        said.append(token.id)
        if len(said) == 10:
            generation.forget_session()
    assert said == plain(family, "family", asked)
    assert not generation.summary.degraded


def test_stop_token_ends_the_text(device: TextDevice, family: TextFamily) -> None:
    """The text ends before the first stop token, which is no part of it."""
    asked = prompt(device, QUESTIONS[0])
    text = plain(family, "family", asked)
    stop = next(token for token in text[5:] if token not in text[:5])
    device.tokenizer.stop_tokens, before = frozenset([stop]), device.tokenizer.stop_tokens
    try:
        generation = device.continue_from(asked, max_tokens=LENGTH, mode="family")
        assert ids(generation) == text[: text.index(stop)]
    finally:
        device.tokenizer.stop_tokens = before
    assert generation.summary.finish == "stop"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"seed": -1}, "seed -1"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]"),
        ({"messages": "x" * 5000}, "fewer than"),
    ],
)
def test_bad_input_is_named(device: TextDevice, options: dict[str, object], match: str) -> None:
    """Each raises InputError with the field and its value, before anything is computed."""
    asked = {"messages": "hello", **options}
    with pytest.raises(InputError, match=match):
        device.generate(asked.pop("messages"), **asked)  # type: ignore[arg-type]


def test_the_wrong_kind_of_bundle_is_refused(bundle: Path) -> None:
    """An image bundle is no language model, nor the other way round."""
    with pytest.raises(BundleError, match="image-classification"):
        TextFamily.load("families/fashion/bundle")
    with pytest.raises(BundleError, match="text-generation"):
        Device.open(bundle)


def test_settings_are_the_defaults_of_a_text(bundle: Path, server: ServerProcess) -> None:
    """Length, mode and number of drafts come from the settings where the call says nothing."""
    text = TextSettings(mode="local", max_tokens=7)
    with TextDevice.open(bundle, DeviceSettings(broker=server.broker, text=text)) as device:
        generation = device.generate("hello")
        assert len(list(generation)) == 7
        assert generation.summary.mode == "local"
