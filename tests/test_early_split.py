"""Under hard strain a device stops at a split before its exit, where the family has one and a server takes it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.utils import extract_model

from freezing import freeze
from kinflow.bundle import MANIFEST
from kinflow.device import Device
from kinflow.estimate import LinkEstimate
from kinflow.family import Family
from kinflow.fleet import Fleet, ServerProcess
from kinflow.policy import NoRoute, Offload, Rate, Route, Strain, leave_early
from kinflow.preprocess import Preprocessor
from kinflow.settings import DeviceSettings
from system_fixtures import FASHION, copy_bundle, member_answer, sample_images

IMAGE = sample_images(1)[0]
HOT, WARM, COOL = Strain(1.0, "the board is at 85 °C of 80"), Strain(0.4, "warm"), Strain(0.0, "")
# A value in the middle of the committed device graph.
MIDDLE = "relu_1"


def cut(folder: Path) -> Path:
    """The committed family with its device graph cut in two at a split s0: the same computation, nothing is trained."""
    copy_bundle(folder, thresholds={"device": 0.5, "edge": 0.0})
    manifest = json.loads((folder / MANIFEST).read_text())
    whole = folder / "device.onnx"
    extract_model(str(whole), str(folder / "stem.onnx"), ["x"], [MIDDLE])
    extract_model(str(whole), str(folder / "rest.onnx"), [MIDDLE], ["features", "logits"])
    (folder / "device.tflite").unlink()
    opened = onnx.load(folder / "stem.onnx")
    shape = [size.dim_value for size in opened.graph.output[0].type.tensor_type.shape.dim][1:]
    device = manifest["segments"]["device"]
    graph = device["graphs"]["onnx"]

    def file(name: str) -> dict[str, Any]:
        data = (folder / name).read_bytes()
        return {"path": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    middle = {"name": MIDDLE, "shape": shape}
    stem = {**graph, "file": file("stem.onnx"), "outputs": [middle]}
    manifest["segments"]["stem"] = {**device, "split": "s0", "exit": None, "graphs": {"onnx": stem}}
    device["source"] = "s0"
    device["graphs"] = {"onnx": {**graph, "file": file("rest.onnx"), "input": middle}}
    codec = {"kind": "uniform", "bits": 8, "step": [0.05] * shape[0], "zero": [0] * shape[0], "table": None}
    manifest["splits"]["s0"] = {
        "shape": shape,
        "codecs": {"q8": {**codec, "bytes_mean": float(np.prod(shape))}},
        "default_codec": "q8",
    }
    for member in manifest["members"].values():
        member["segments"].insert(0, "stem")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(tmp_path_factory.mktemp("cut") / "bundle")


@pytest.fixture(scope="module")
def edge(bundle: Path) -> Iterator[ServerProcess]:
    with Fleet([bundle]) as fleet:
        yield fleet.start("edge")


ROUTE = Route("edge-1", "edge", "s0", (Rate("q8", 850.0),), LinkEstimate(round_trip_s=0.010))
LEFT = Offload(ROUTE, "q8", "left at the earlier split s0 because hot")


@pytest.mark.parametrize(
    ("share", "routes", "remaining_s", "decision"),
    [
        (0.5, [ROUTE], 1.0, LEFT),
        (1.0, [ROUTE], 0.011, LEFT),
        (0.49, [ROUTE], 1.0, None),
        (0.0, [ROUTE], 1.0, None),
        (1.0, [ROUTE], 0.009, None),
        (1.0, NoRoute("no server found yet"), 1.0, None),
    ],
)
def test_the_rule(share: float, routes: list[Route] | NoRoute, remaining_s: float, decision: Offload | None) -> None:
    """Hard strain and a server that takes the split in time; else on to the exit."""
    assert leave_early(Strain(share, "hot"), "s0", routes, remaining_s) == decision


def test_a_member_goes_on_from_where_it_stopped(bundle: Path) -> None:
    """In two parts it computes what the committed member computes in one."""
    cut_family, committed = Family.load(bundle), Family.load(FASHION / "bundle")
    member = cut_family.member("device")
    batch = Preprocessor(committed.preprocess)(IMAGE)
    assert member.early_splits == ("s0",)
    output = member.finish(member.start(batch, "s0"), "s0")
    expected = committed.member("device").run(batch)
    np.testing.assert_allclose(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (output.split, output.exit) == ("s1", "device")


class Counted:
    """How often a segment ran."""

    def __init__(self, device: Device, position: int) -> None:
        segment = device._member.segments[position]
        self.times = 0
        self._runner = segment.runner
        object.__setattr__(segment, "runner", self)

    def run(self, batch: Any) -> Any:
        self.times += 1
        return self._runner.run(batch)


def test_a_hot_device_stops_at_the_earlier_split(bundle: Path, edge: ServerProcess) -> None:
    """Its last segment and exit do not run, the edge continues from s0, and the answer says why; warm, all is run."""
    strains = [COOL, WARM, HOT, HOT, COOL]
    found: list[tuple[str, bool, str, int]] = []
    settings = DeviceSettings(broker=edge.broker, deadline_s=15.0)
    with Device.open(bundle, settings, strain=lambda: strains[len(found)]) as device:
        assert device.wait_for_server(15)
        last = Counted(device, 1)
        for _ in strains:
            answer = device.infer(IMAGE)
            found.append((answer.tier, answer.degraded, answer.codec, last.times))
            if strains[len(found) - 1] is HOT:
                assert answer.reason == f"left at the earlier split s0 because {HOT.reason}"
                assert answer.index == member_answer(Family.load(FASHION / "bundle"), "edge", IMAGE)[0]
    left = ("edge", False, "q8", 2)
    assert found == [("device", False, "", 1), ("device", False, "", 2), left, left, ("device", False, "", 3)]


def test_nobody_answers_what_left_early(bundle: Path) -> None:
    """The server is silent: the device finishes what it began, still in time, and tells both reasons."""
    strain = COOL
    with Fleet([bundle]) as fleet:
        server = fleet.start("edge")
        settings = DeviceSettings(broker=server.broker, deadline_s=2.0)
        with Device.open(bundle, settings, strain=lambda: strain) as device:
            assert device.wait_for_server(15)
            kept = device.infer(IMAGE)
            strain = HOT
            assert device.infer(IMAGE).tier == "edge"
            freeze(server.pid)
            try:
                answer = device.infer(IMAGE)
            finally:
                os.kill(server.pid, signal.SIGCONT)
    assert (answer.tier, answer.degraded, answer.label) == ("device", False, kept.label)
    assert answer.bytes_up > 0
    assert answer.reason.startswith(f"confident; kept although {HOT.reason}: "), answer.reason
