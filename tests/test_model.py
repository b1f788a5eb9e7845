"""What a server serves of a family, and which requests it refuses before it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kinflow.errors import FamilyMismatch
from kinflow.family import Family
from kinflow.messages import Request, Served
from kinflow_bench import synthetic
from kinflow_edge.model import ServedFamily

REQUEST = Request(bytes(16), "device-1", "synthetic", "1.0.0", "s1", "q8", 1000.0)


@pytest.fixture(scope="module")
def edge(family: Family) -> ServedFamily:
    return ServedFamily.open(family, "edge", threads=1)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family whose edge member has features of its own."""
    folder = tmp_path_factory.mktemp("chain") / "bundle"
    return Family.load(synthetic.write(folder, synthetic.Shape(side=8, channels=2, chain=True)))


def test_a_larger_member_may_continue_from_the_same_features(fashion: Path) -> None:
    """In the committed family edge and cloud begin at the device's split: the edge forwards what came."""
    family = Family.load(fashion)
    edge, cloud = (ServedFamily.open(family, name, threads=1) for name in ("edge", "cloud"))
    assert (list(edge.entries), edge.next_split, edge.forwards) == (["s1"], "s1", True)
    assert (list(cloud.entries), cloud.next_split, cloud.forwards) == (["s1"], None, False)


def test_a_member_is_opened_at_every_split_it_can_continue_from(chain: Family) -> None:
    """In a chain the cloud member takes the device's and the edge's features, the edge member the device's."""
    family = chain
    cloud = ServedFamily.open(family, "cloud", threads=1)
    edge = ServedFamily.open(family, "edge", threads=1)
    assert list(cloud.entries) == ["s1", "s2"]
    assert list(edge.entries) == ["s1"]
    assert (edge.next_split, edge.forwards, cloud.next_split) == ("s2", False, None)
    assert (edge.exit, cloud.exit) == (family.manifest.exits["edge"], family.manifest.exits["cloud"])
    for split, entry in cloud.entries.items():
        assert entry.shape == tuple(family.manifest.splits[split].shape)
        assert set(entry.codecs) == set(family.manifest.splits[split].codecs)


def test_an_entry_continues_the_device(edge: ServedFamily, family: Family) -> None:
    """Device features through the codec and the entry are the whole member's answer, up to the quantisation."""
    batch = np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8)).astype(np.float32) / np.float32(255)
    features = family.member("device").run(batch).features
    assert features is not None
    entry, codec = edge.entry(REQUEST)
    decoded = codec.decode(codec.encode(features[0]))
    logits = entry.member.run(decoded[None]).logits
    np.testing.assert_allclose(logits, family.member("edge").run(batch).logits, atol=1e-3)


def test_the_status_names_family_splits_and_codecs(edge: ServedFamily) -> None:
    """What devices choose a server by."""
    assert edge.served() == Served("synthetic", "1.0.0", {"s1": ["q8"]})


def test_warming_up_runs_every_entry(edge: ServedFamily) -> None:
    """And says what an item takes."""
    assert 0 < edge.warm_up() < 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "2.0.0"}, "synthetic 1.0.0 is served here, the request is for 2.0.0"),
        ({"split": "s2"}, r"split 's2' is not served here, \['s1'\] are"),
        ({"codec": "q4"}, r"codec 'q4' is unknown at s1, \['q8'\] are known"),
    ],
)
def test_a_request_that_does_not_match_is_refused(edge: ServedFamily, change: dict[str, Any], said: str) -> None:
    """Never a wrong answer: what differs is named."""
    with pytest.raises(FamilyMismatch, match=said):
        edge.entry(msgspec.structs.replace(REQUEST, **change))


def test_a_member_that_cannot_serve_is_refused(family: Family) -> None:
    """One that does not exist, and one that only begins at the input."""
    with pytest.raises(FamilyMismatch, match=r"has the members .* not 'tiny'"):
        ServedFamily.open(family, "tiny", threads=1)
    with pytest.raises(FamilyMismatch, match="member 'device' of synthetic begins at the input"):
        ServedFamily.open(family, "device", threads=1)
