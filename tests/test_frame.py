"""Frames: what is packed comes back, and nothing else ever passes or raises anything but FrameError."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinflow.errors import FrameError
from kinflow.frame import (
    MAGIC,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    OVERHEAD_BYTES,
    VERSION,
    pack,
    unpack,
)
from kinflow.messages import (
    MAX_DEADLINE_MS,
    MAX_DRAFTS,
    Busy,
    Cancel,
    Echo,
    Failure,
    Fetch,
    Hop,
    Message,
    NodeStatus,
    Part,
    Probe,
    Release,
    Reply,
    Request,
    Served,
    Verdict,
    Verify,
)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
ids = st.binary(min_size=16, max_size=16)
tiers = st.sampled_from(["device", "edge", "cloud"])
times = st.floats(0, 1e12)
text = st.text(st.characters(codec="utf-8"), max_size=64)
hops = st.builds(Hop, names, tiers, times, times, times, times, bytes_up=st.integers(min_value=0, max_value=2**40))
requests = st.builds(Request, ids, names, names, names, names, names, deadline_ms=st.floats(0, MAX_DEADLINE_MS))
replies = st.builds(
    Reply,
    ids,
    st.integers(0, 2**31),
    st.floats(0, 1),
    tiers,
    names,
    degraded=st.booleans(),
    reason=text,
    hops=st.lists(hops, max_size=2),
)
positions = st.integers(0, 2**24)
verifies = st.builds(
    Verify,
    ids,
    *[names] * 5,
    session=ids,
    start=positions,
    confirmed=st.integers(1, 2**24),
    count=st.integers(1, 2**24),
    exit=names,
    exact=st.booleans(),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
    deadline_ms=st.floats(0, MAX_DEADLINE_MS),
)
verdicts = st.builds(
    Verdict,
    ids,
    st.integers(0, MAX_DRAFTS),
    st.integers(0, 2**32 - 1),
    st.lists(st.floats(0, 1), max_size=4),
    tiers,
    names,
    names,
    redone=positions,
    degraded=st.booleans(),
    reason=text,
    hops=st.lists(hops, max_size=2),
    layer_tokens=st.integers(0, 2**40),
    passes=positions,
)
releases = st.builds(Release, ids, names, ids)
busies = st.builds(Busy, ids, names, times)
failures = st.builds(Failure, ids, names, text.map(lambda value: value[:32]), text)
cancels = st.builds(Cancel, ids, names)
probes = st.builds(Probe, ids, names)
echoes = st.builds(Echo, ids, names, times)
fetches = st.builds(
    Fetch, ids, names, names, st.text(min_size=1, max_size=64), st.integers(0, 2**40), st.integers(1, 2**20)
)
parts = st.builds(Part, ids, names, st.integers(0, 2**40))
served = st.builds(Served, names, names, st.dictionaries(names, st.lists(names, max_size=2), max_size=2))
statuses = st.builds(
    NodeStatus,
    names,
    tiers,
    st.sampled_from(["ready", "failing", "draining", "offline"]),
    software=text.map(lambda value: value[:32]),
    families=st.lists(served, max_size=2),
    queue_ms=times,
    load=times,
    served=st.integers(0, 2**40),
    rejected=st.integers(0, 2**40),
)
STRATEGIES: dict[type, st.SearchStrategy[Any]] = {
    Request: requests,
    Reply: replies,
    Verify: verifies,
    Verdict: verdicts,
    Release: releases,
    Busy: busies,
    Failure: failures,
    Cancel: cancels,
    Probe: probes,
    Echo: echoes,
    Fetch: fetches,
    Part: parts,
    NodeStatus: statuses,
}
messages = st.one_of(*STRATEGIES.values())

BUSY = Busy(b"i" * 16, "edge-1", 12.5)


def sealed(header: bytes, payload: bytes = b"", *, magic: bytes = MAGIC, version: int = VERSION) -> bytes:
    """A frame written by the table in frame.py and not by pack(): the crc is right, the rest as given."""
    body = struct.pack("<4sBBBBII", magic, version, 0, 0, 0, len(header), len(payload)) + header + payload
    return body + struct.pack("<I", zlib.crc32(body))


def header_of(*fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


def test_every_message_type_is_covered_here() -> None:
    """A message type added to the wire must be added to the strategies."""
    assert set(STRATEGIES) == set(get_args(Message))


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.__name__)
def test_what_is_packed_comes_back(kind: type) -> None:
    """For every message of every type with any payload, unpack gives what pack took."""

    @given(STRATEGIES[kind], st.binary(max_size=300))
    def check(message: Any, payload: bytes) -> None:
        assert unpack(pack(message, payload)) == (message, payload)

    check()


def test_the_bytes_of_a_frame_are_fixed() -> None:
    """The wire format cannot change unnoticed: another language's client depends on these very bytes."""
    request = Request(bytes(range(16)), "device-1", "fashion", "1.0.0", "s1", "s1-q4", 250.0)
    assert pack(request, b"\x01\x02").hex() == (
        "4b494e46010000004400000002000000"
        "98a772657175657374c410000102030405060708090a0b0c0d0e0f"
        "a86465766963652d31a766617368696f6ea5312e302e30a27331a573312d7134cb406f400000000000"
        "0102940639b9"
    )


def test_a_frame_written_by_hand_is_read() -> None:
    """The table in frame.py is enough to write a frame."""
    header = header_of("busy", b"i" * 16, "edge-1", 12.5)
    assert unpack(sealed(header, b"payload")) == (BUSY, b"payload")


def test_fields_of_a_later_version_are_ignored_and_missing_ones_have_defaults() -> None:
    """A minor version may append fields on either side."""
    assert unpack(sealed(header_of("busy", b"i" * 16, "edge-1", 12.5, "new", {"a": [1]}))).message == BUSY
    reply = unpack(sealed(header_of("reply", b"i" * 16, 3, 0.5, "edge", "e1"))).message
    assert reply == Reply(b"i" * 16, 3, 0.5, "edge", "e1", degraded=False, reason="", hops=[])


def test_every_truncation_and_extension_is_refused() -> None:
    """No proper prefix of a frame passes, nor a frame with something behind it."""
    whole = pack(BUSY, b"payload")
    for length in range(len(whole)):
        with pytest.raises(FrameError, match="truncated"):
            unpack(whole[:length])
    with pytest.raises(FrameError, match="padded"):
        unpack(whole + b"\0")


def test_every_flipped_bit_is_refused() -> None:
    """The crc or a check before it catches each single bit, the reserved ones included."""
    whole = pack(BUSY, b"payload")
    for position in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(FrameError):
            unpack(bytes(damaged))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "at least 20 bytes, got 0"),
        (sealed(b"", magic=b"HTTP"), "begins with b'KINF', got b'HTTP'"),
        (sealed(b"", version=2), "version 1 is spoken here, got 2"),
        (sealed(b""), "header: "),
        (sealed(b"\xc1" * 8), "header: "),
        (sealed(header_of("busy", b"i" * 16, "edge-1", 12.5) + b"\0"), "header: .*trailing"),
        (sealed(header_of("shutdown", b"i" * 16)), "header: .*'shutdown'"),
        (sealed(header_of("busy", b"short", "edge-1", 12.5)), "header: .*16"),
        (sealed(header_of("busy", b"i" * 16, "edge 1", 12.5)), "header: .*regex"),
        (sealed(header_of("busy", b"i" * 16, "edge-1\n", 12.5)), "header: .*regex"),
        (sealed(header_of("busy", b"i" * 16, "edge/+", 12.5)), "header: .*regex"),
        (sealed(header_of("busy", b"i" * 16, "e" * 65, 12.5)), "header: .*64"),
        (sealed(header_of("busy", b"i" * 16, "edge-1", float("nan"))), "header: "),
        (sealed(header_of("busy", b"i" * 16, "edge-1", float("inf"))), "header: "),
        (sealed(header_of("busy", b"i" * 16, "edge-1", -1.0)), "header: "),
        (sealed(header_of("request", b"i" * 16, *"abcde", float("inf"))), "header: "),
        (sealed(header_of("reply", b"i" * 16, 0, 1.5, "edge", "e")), "header: "),
        (sealed(header_of("reply", b"i" * 16, 0, float("nan"), "edge", "e")), "header: "),
        (sealed(header_of("reply", b"i" * 16, -1, 0.5, "edge", "e")), "header: "),
        (sealed(header_of("reply", b"i" * 16, 0, 0.5, "moon", "e")), "header: .*'moon'"),
        (sealed(header_of("failure", b"i" * 16, "n", "code", "m" * 513)), "header: .*512"),
        (sealed(msgspec.msgpack.encode({"type": "busy"})), "header: "),
        # Text that is not UTF-8.
        (sealed(b"\x94\xa4busy\xc4\x10" + b"i" * 16 + b"\xa2\xff\xfe\xcb" + bytes(8)), "header: "),
        # Lengths far beyond the header's end.
        (sealed(b"\xdd\xff\xff\xff\xff"), "header: "),
        (sealed(b"\x92\xa4busy\xc6\xff\xff\xff\xff"), "header: "),
        # A field too many that is nested without end.
        (sealed(b"\x95" + header_of("busy", b"i" * 16, "edge-1", 12.5)[1:] + b"\x91" * 10_000), "header: "),
    ],
)
def test_a_foreign_or_broken_frame_is_named(data: bytes, said: str) -> None:
    """Each refusal says what was expected and what came, and is a FrameError."""
    with pytest.raises(FrameError, match=said):
        unpack(data)


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes", "said"),
    [
        (MAX_HEADER_BYTES + 1, 0, f"header is {MAX_HEADER_BYTES + 1} bytes, at most {MAX_HEADER_BYTES}"),
        (0, MAX_PAYLOAD_BYTES + 1, f"payload is {MAX_PAYLOAD_BYTES + 1} bytes, at most {MAX_PAYLOAD_BYTES}"),
        (0xFFFFFFFF, 0xFFFFFFFF, "header is 4294967295 bytes"),
    ],
)
def test_announced_sizes_over_the_limits_are_refused(header_bytes: int, payload_bytes: int, said: str) -> None:
    """Sizes are judged by what the prefix announces, before the length of the data is."""
    prefix = struct.pack("<4sB3xII", MAGIC, VERSION, header_bytes, payload_bytes)
    with pytest.raises(FrameError, match=said):
        unpack(prefix + b"\0" * 4)


def test_pack_keeps_to_the_limits() -> None:
    """The largest payload passes, one byte more does not, nor a header over its limit."""
    largest = pack(BUSY, bytes(MAX_PAYLOAD_BYTES))
    assert len(largest) <= MAX_FRAME_BYTES
    assert len(unpack(largest).payload) == MAX_PAYLOAD_BYTES
    with pytest.raises(FrameError, match="payload is"):
        pack(BUSY, bytes(MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(FrameError, match="header is"):
        pack(NodeStatus("n", "edge", "ready", families=[Served("f", "1", {"s": ["c" * 60] * 300})]))


def test_nothing_is_allocated_before_the_sizes_are_checked() -> None:
    """A refused frame of the largest size costs no copy of itself."""
    whole = pack(BUSY, bytes(MAX_PAYLOAD_BYTES))
    refused = [whole[:-1], whole + b"\0", b"X" + whole[1:], whole[:-1] + bytes([whole[-1] ^ 1])]
    tracemalloc.start()
    try:
        for data in refused:
            with pytest.raises(FrameError):
                unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 256 * 1024
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_random_bytes_raise_frame_errors_only(data: bytes) -> None:
    """Nothing random is a frame, and nothing else than FrameError comes out."""
    with pytest.raises(FrameError):
        unpack(data)


@given(st.binary(max_size=120))
def test_random_headers_raise_frame_errors_only(header: bytes) -> None:
    """With the prefix and the crc right, the header's decoder meets the noise: still FrameError or a message."""
    try:
        frame = unpack(sealed(header))
    except FrameError:
        return
    assert isinstance(frame.message, get_args(Message))


@given(messages, st.data())
def test_mutated_headers_raise_frame_errors_only(message: Any, data: st.DataObject) -> None:
    """Valid headers with bytes changed, cut out or put in: FrameError, or a message that can be packed again."""
    header = bytearray(msgspec.msgpack.encode(message))
    start = data.draw(st.integers(0, len(header)))
    end = data.draw(st.integers(start, min(start + 8, len(header))))
    header[start:end] = data.draw(st.binary(max_size=8))
    try:
        frame = unpack(sealed(bytes(header)))
    except FrameError:
        return
    assert unpack(pack(frame.message)).message == frame.message


def test_the_overhead_is_what_the_table_says() -> None:
    """Twenty bytes beside header and payload."""
    assert OVERHEAD_BYTES == 20
    assert len(pack(BUSY)) == 20 + len(msgspec.msgpack.encode(BUSY))
