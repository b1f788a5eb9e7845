"""Members in service: where each begins, what it is sent, and which answer leaves where."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from kinflow import idx
from kinflow.errors import FamilyMismatch
from kinflow.family import INPUT, Family
from kinflow.manifest import Exit, Manifest, Member
from kinflow_bench import synthetic
from kinflow_builder import measure
from kinflow_builder.measure import TierRun
from kinflow_builder.service import cascade

FASHION = Path(__file__).parents[1] / "families" / "fashion"
IMAGES = 60


def with_members(manifest: Manifest, members: dict[str, list[str]]) -> Manifest:
    return msgspec.structs.replace(manifest, members={name: Member(parts) for name, parts in members.items()})


@pytest.fixture(scope="module")
def fashion() -> Family:
    """The committed family: edge and cloud both continue from the device's split."""
    return Family.load(FASHION / "bundle")


def test_sources_follow_the_segments(tmp_path: Path, fashion: Family) -> None:
    """In a chain each member begins where the one below ends; two larger ones may both begin at the device's split."""
    chain = Family.load(synthetic.write(tmp_path / "bundle", synthetic.Shape(side=8, channels=2, chain=True))).manifest
    assert measure.sources(chain) == {"device": INPUT, "edge": "s1", "cloud": "s2"}
    without_edge = with_members(chain, {"device": ["trunk0"], "cloud": ["trunk0", "trunk1", "trunk2"]})
    assert measure.sources(without_edge) == {"device": INPUT, "cloud": "s1"}
    # The edge's member ends with its exit: the cloud's begins at the device's split, as the edge's does.
    assert measure.sources(fashion.manifest) == {"device": INPUT, "edge": "s1", "cloud": "s1"}


def test_a_member_apart_is_refused(fashion: Family) -> None:
    """A member that shares no split with a smaller one cannot continue from it."""
    manifest = with_members(fashion.manifest, {"edge": ["device", "edge"], "cloud": ["device"]})
    with pytest.raises(FamilyMismatch, match="'cloud' of fashion begins at no split"):
        measure.sources(manifest)


def test_coded_runs_are_what_the_members_do(family: Family) -> None:
    """Logits and sizes are those of each member on what the codec gives back; what is forwarded is the same bytes."""
    images = np.random.default_rng(0).uniform(0, 1, (7, 1, 8, 8)).astype(np.float32)
    device, edge, cloud = measure.run_coded(family, iter([images[:4], images[4:]]))
    features = family.member("device").run(images).features
    assert features is not None
    coded = [family.codec("s1").encode(item) for item in features]
    assert edge.bytes_up.tolist() == cloud.bytes_up.tolist() == [len(data) for data in coded]
    assert device.bytes_up.tolist() == [0] * 7
    decoded = np.stack([family.codec("s1").decode(data) for data in coded])
    expected = family.member("cloud", source="s1").run(decoded).logits
    np.testing.assert_allclose(cloud.logits, expected, rtol=1e-5)
    np.testing.assert_array_equal(edge.logits, cloud.logits)


def test_codecs_are_chosen_by_split(fashion: Family) -> None:
    """Another codec at the split changes the bytes of everything that is sent from there."""
    images = idx.read(FASHION / "samples/images-idx3-ubyte.gz", 3)[:IMAGES]
    batches = [(images[:, None] / 255).astype(np.float32)]
    other = next(name for name in fashion.manifest.splits["s1"].codecs if name != fashion.codec("s1").name)
    plain, changed = measure.run_coded(fashion, batches), measure.run_coded(fashion, batches, {"s1": other})
    for before, after in zip(plain[1:], changed[1:], strict=True):
        assert (before.bytes_up != after.bytes_up).any()


def test_full_precision_is_the_whole_member(fashion: Family) -> None:
    """One machine, nothing coded: as the member computes from the input on."""
    batch = np.random.default_rng(1).normal(0, 1, (3, 1, 28, 28)).astype(np.float32)
    logits = measure.run_full_precision(fashion, "edge", measure.in_batches(batch))
    np.testing.assert_allclose(logits, fashion.member("edge").run(batch).logits, rtol=1e-4, atol=1e-4)


def test_cascade_leaves_at_the_first_sure_exit() -> None:
    """Shares, bytes and right answers of four images, counted by hand."""
    unsure, sure_0, sure_1 = [0.0, 0.1], [9.0, 0.0], [0.0, 9.0]

    def run(name: str, logits: list[list[float]], size: int) -> TierRun:
        return TierRun(name, name, INPUT, np.array(logits, np.float32), np.full(4, size))

    runs = [
        run("device", [sure_0, unsure, unsure, unsure], 0),
        run("edge", [sure_1, sure_1, sure_0, unsure], 10),
        run("cloud", [sure_1, sure_1, sure_1, unsure], 100),
    ]
    exits = {"device": Exit(1.0, 0.9, 0.0), "edge": Exit(1.0, 0.9, 0.0), "cloud": Exit(1.0, 0.0, 0.0)}
    found = cascade(exits, runs, np.array([0, 1, 1, 1]))
    assert found.shares == {"device": 0.25, "edge": 0.5, "cloud": 0.25}
    assert found.reached == {"device": 1.0, "edge": 0.75, "cloud": 0.25}
    assert found.bytes_mean == (3 * 10 + 1 * 100) / 4
    assert found.top1 == 0.75
    assert cascade(exits, runs, np.array([0, 1, 1, 1]), threshold=1.0).shares["cloud"] == 1.0
    assert cascade(exits, runs, np.array([0, 1, 1, 1]), threshold=0.0).shares["device"] == 1.0


def test_median_is_of_real_calls() -> None:
    """Every call is made, also one that takes longer than the time given to all."""
    calls = []
    assert measure.median_s(lambda: calls.append(1)) >= 0
    assert len(calls) >= 5
