"""docs/protocol.md is enough to write a client: its own code blocks talk to a real server, without kinflow."""

from __future__ import annotations

import json
import queue
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import paho.mqtt.client as mqtt
import pytest

from kinflow import frame, messages
from kinflow.codec import UniformCodec, pack_table
from kinflow.discovery import TTL_S
from kinflow.family import Family
from kinflow.fleet import Fleet, ServerProcess
from kinflow.idx import read
from kinflow.mqtt import MAX_PACKET_BYTES
from kinflow_edge import recent

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "families/fashion/bundle"
PAGE = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
FAMILY = json.loads((BUNDLE / "family.json").read_text(encoding="utf-8"))
DEVICE = FAMILY["segments"]["device"]
SPLIT = DEVICE["split"]


def blocks(info: str) -> list[str]:
    """The fenced blocks of the page that begin with ```info."""
    return re.findall(rf"^```{info}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's Python defines; it may not lean on kinflow."""
    code = "\n".join(blocks("python"))
    assert "kinflow" not in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/protocol.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with Fleet([BUNDLE]) as fleet:
        yield fleet.start("edge", "--no-advertise")


def run_graph(segment: str, values: Any) -> dict[str, Any]:
    """One item through a segment's ONNX graph, by ONNX Runtime itself."""
    graph = FAMILY["segments"][segment]["graphs"]["onnx"]
    session = onnxruntime.InferenceSession(str(BUNDLE / graph["file"]["path"]), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {graph["input"]["name"]: values[None].astype(np.float32)})
    return {output["name"]: value[0] for output, value in zip(graph["outputs"], outputs, strict=True)}


def sample_features(count: int) -> list[Any]:
    """Features of the first sample images, as a foreign device would compute them."""
    spec = FAMILY["preprocess"]
    images = read(BUNDLE.parent / "samples/images-idx3-ubyte.gz")[:count]
    planes = (images[:, None].astype(np.float32) / 255 - spec["mean"][0]) / spec["std"][0]
    return [run_graph("device", plane)["features"] for plane in planes]


def coding(name: str) -> tuple[dict[str, Any], bytes]:
    """A codec's entry in family.json, and its table."""
    spec = FAMILY["splits"][SPLIT]["codecs"][name]
    return spec, (BUNDLE / spec["table"]["path"]).read_bytes()


def ask(page: dict[str, Any], server: ServerProcess, payload: bytes, **changed: Any) -> Any:
    """One request by the page's client."""
    fields: dict[str, Any] = {
        "id": uuid.uuid4().bytes,
        "client": f"foreign-{uuid.uuid4().hex[:8]}",
        "family": FAMILY["id"],
        "version": FAMILY["version"],
        "split": SPLIT,
        "codec": FAMILY["splits"][SPLIT]["default_codec"],
        "deadline_ms": 5000,  # an integer where the page says number
    } | changed
    host, port = server.broker.split(":")
    return page["ask"](host, int(port), "edge", ["request", *fields.values()], payload)


def test_worked_example_is_what_the_page_and_the_library_code(page: dict[str, Any]) -> None:
    """The example's hex comes out of the page's encoder and the library's, and goes back to its features."""
    expected = bytes.fromhex(blocks("hex codec")[0])
    frequencies = np.ones((2, 256), "<u2")
    frequencies[0, 0x88] = 16129
    frequencies[1] = 64
    spec = {"bits": 4, "step": [0.5, 2.0], "zero": [8, 8]}
    features = np.array([[[0, 0.1, -0.6]], [[3, 100, -1]]], np.float32)
    decoded = [[[0, 0, -0.5]], [[4, 14, 0]]]
    table = pack_table(frequencies)
    assert page["encode"](features, spec, table) == expected
    assert page["decode"](expected, spec, table, features.shape).tolist() == decoded
    library = UniformCodec(
        "example",
        (2, 1, 3),
        4,
        2,
        np.array(spec["step"], np.float32).reshape(-1, 1, 1),
        np.array(spec["zero"], np.int32).reshape(-1, 1, 1),
        frequencies.astype(np.uint16),
    )
    assert library.encode(features) == expected
    assert library.decode(expected).tolist() == decoded


def test_worked_states_follow_from_the_formula() -> None:
    """Each row of the table of states follows from the one before by the formula."""
    rows = re.findall(r"^\| (0x\w\w) \| (\d+) \| (\d+) \| (0x\w+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    state = 0
    for _, frequency, start, after in rows:
        state = (state // int(frequency) << 14) + state % int(frequency) + int(start)
        assert state == int(after, 16)
    assert bytes.fromhex(blocks("hex codec")[0])[2:] == state.to_bytes(5, "little")


def test_worked_frame_is_what_the_page_packs(page: dict[str, Any]) -> None:
    """The frame in hex is the page's own pack() of the request that it describes."""
    expected = bytes.fromhex(blocks("hex frame")[0])
    payload = bytes.fromhex(blocks("hex codec")[0])
    request = ["request", bytes(range(16)), "cam-1", "fashion", "1.0.0", "s1", "s1-q4", 250.0]
    assert page["pack"](request, payload) == expected
    assert page["unpack"](expected) == (request, payload)


@pytest.mark.parametrize("name", sorted(FAMILY["splits"][SPLIT]["codecs"]))
def test_page_codec_equals_the_library_on_real_features(page: dict[str, Any], name: str) -> None:
    """On real features both give the same bytes and the same features, at 4 and at 8 bits."""
    spec, table = coding(name)
    shape = tuple(FAMILY["splits"][SPLIT]["shape"])
    library = Family.load(BUNDLE).codec(SPLIT, name)
    for features in sample_features(5):
        payload = page["encode"](features, spec, table)
        assert payload == library.encode(features)
        assert np.array_equal(page["decode"](payload, spec, table, shape), library.decode(payload))


def test_page_client_gets_the_right_replies(page: dict[str, Any], server: ServerProcess) -> None:
    """The server's label and tier are those of its graph, fed with the features that the bytes stand for."""
    name = FAMILY["splits"][SPLIT]["default_codec"]
    spec, table = coding(name)
    for features in sample_features(8):
        payload = page["encode"](features, spec, table)
        decoded = page["decode"](payload, spec, table, features.shape)
        logits = run_graph("edge", decoded)["logits"]
        header = ask(page, server, payload)
        tag, _, label, confidence, tier, exit_name, _, _, hops = header
        assert (tag, label, tier) == ("reply", int(logits.argmax()), "edge")
        assert exit_name == FAMILY["segments"]["edge"]["exit"]
        scaled = np.exp((logits - logits.max()) / FAMILY["exits"][exit_name]["temperature"])
        assert confidence == pytest.approx(1 / scaled.sum(), abs=1e-4)
        assert len(hops) == 1
        assert hops[0][:2] == [server.ready["node"], "edge"]
        assert all(time_ms >= 0 for time_ms in hops[0][2:6])


def test_page_client_gets_failures_with_the_codes_of_the_page(page: dict[str, Any], server: ServerProcess) -> None:
    """Another version is answered with `mismatch`, bytes that do not decode with `codec`; the page lists both."""
    assert ask(page, server, b"", version="0.0.9")[3] == "mismatch"
    header = ask(page, server, b"\x01\x00")
    assert header[0] == "failure"
    assert header[3] == "codec"
    for code in ("mismatch", "codec", "backend", "internal"):
        assert f"| `{code}` |" in PAGE


def test_too_short_a_deadline_is_busy(page: dict[str, Any], server: ServerProcess) -> None:
    """With less than the reserve left, the server refuses at once; the page's client reads it."""
    payload = page["encode"](sample_features(1)[0], *coding(FAMILY["splits"][SPLIT]["default_codec"]))
    request_id = uuid.uuid4().bytes
    fields = ["request", request_id, "foreign-busy", FAMILY["id"], FAMILY["version"], SPLIT]
    fields += [FAMILY["splits"][SPLIT]["default_codec"], 1.0]
    header = ask_patiently(page, server, fields, payload)
    assert header[:3] == ["busy", request_id, server.ready["node"]]
    assert header[3] >= 0


def ask_patiently(page: dict[str, Any], server: ServerProcess, fields: list[Any], payload: bytes) -> Any:
    """Like the page's ask(), but it waits longer than the deadline that it names."""
    answers: queue.Queue[bytes] = queue.Queue()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, fields[2], protocol=mqtt.MQTTv5)
    client.on_connect = lambda *_: client.subscribe(f"kinflow/v1/reply/{fields[2]}")
    topic = f"kinflow/v1/edge/{fields[3]}/{fields[5]}/req/{fields[2]}"
    client.on_subscribe = lambda *_: client.publish(topic, page["pack"](fields, payload))
    client.on_message = lambda _client, _data, message: answers.put(message.payload)
    host, port = server.broker.split(":")
    client.connect(host, int(port))
    client.loop_start()
    try:
        return page["unpack"](answers.get(timeout=10))[0]
    finally:
        client.disconnect()
        client.loop_stop()


def test_headers_may_grow(page: dict[str, Any], server: ServerProcess) -> None:
    """A request with a field of a later minor version is understood: the field is ignored."""
    payload = page["encode"](sample_features(1)[0], *coding(FAMILY["splits"][SPLIT]["default_codec"]))
    fields = ["request", uuid.uuid4().bytes, "foreign-new", FAMILY["id"], FAMILY["version"], SPLIT]
    fields += [FAMILY["splits"][SPLIT]["default_codec"], 5000, "from the future"]
    assert ask_patiently(page, server, fields, payload)[0] == "reply"


def test_limits_are_the_library_s() -> None:
    """The sizes that the page names are those that the library holds to."""
    for limit in (frame.MAX_HEADER_BYTES, frame.MAX_PAYLOAD_BYTES, MAX_PACKET_BYTES):
        assert f"{limit:,}" in PAGE
    assert frame.OVERHEAD_BYTES == 20
    assert f"last {recent.CAPACITY:,}" in PAGE
    assert f"TTL {TTL_S} s" in PAGE


def test_tables_list_every_field_in_order() -> None:
    """The tables of the page name the fields of messages.py at their positions, with their defaults' presence."""
    for section, kind in (
        ("request", messages.Request),
        ("reply", messages.Reply),
        ("busy", messages.Busy),
        ("failure", messages.Failure),
        ("status", messages.NodeStatus),
    ):
        text = PAGE.split(f"\n### {section}\n")[1].split("\n### ")[0].split("\n## ")[0]
        rows = re.findall(r"^\| (\d+) \| (\w+) \|", text.split("\nA hop is")[0], re.MULTILINE)
        names = ["tag", *kind.__struct_fields__]
        assert [(int(position), name) for position, name in rows] == list(enumerate(names)), section
    hop = PAGE.split("\nA hop is")[1].split("\n### ")[0]
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", hop, re.MULTILINE)
    assert [name for _, name in rows] == list(messages.Hop.__struct_fields__)
