"""The dataclasses that travel: small, fixed in their order, and unable to carry what the wire refuses."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from kinflow.messages import (
    Busy,
    Cancel,
    Echo,
    Failure,
    Fetch,
    Hop,
    Message,
    Name,
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

FIELDS = {
    Request: ("id", "client", "family", "version", "split", "codec", "deadline_ms"),
    Reply: ("id", "label", "confidence", "tier", "exit", "degraded", "reason", "hops"),
    Verify: (
        "id",
        "client",
        "family",
        "version",
        "split",
        "codec",
        "session",
        "start",
        "confirmed",
        "count",
        "exit",
        "exact",
        "temperature",
        "top_p",
        "seed",
        "deadline_ms",
        "follows",
    ),
    Verdict: (
        "id",
        "accepted",
        "token",
        "probabilities",
        "tier",
        "exit",
        "node",
        "redone",
        "degraded",
        "reason",
        "hops",
        "layer_tokens",
        "passes",
    ),
    Release: ("id", "client", "session"),
    Busy: ("id", "node", "queue_ms"),
    Failure: ("id", "node", "code", "message"),
    Cancel: ("id", "client"),
    Probe: ("id", "client"),
    Echo: ("id", "node", "queue_ms"),
    NodeStatus: (
        "node",
        "tier",
        "state",
        "software",
        "families",
        "queue_ms",
        "load",
        "served",
        "rejected",
        "insecure",
    ),
    Fetch: ("id", "client", "family", "path", "offset", "length"),
    Part: ("id", "node", "total_bytes"),
    Hop: ("node", "tier", "decode_ms", "queue_ms", "compute_ms", "total_ms", "bytes_up"),
    Served: ("family", "version", "splits"),
}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_fields_keep_their_places(kind: type[msgspec.Struct]) -> None:
    """On the wire a field is its position: one may only be appended, and then it needs a default."""
    assert kind.__struct_fields__ == FIELDS[kind]
    assert kind.__struct_config__.array_like
    assert kind.__struct_config__.frozen


def test_tags_are_fixed_and_distinct() -> None:
    """The first element of a header says which message it is."""
    tags = {kind.__name__: kind.__struct_config__.tag for kind in get_args(Message)}
    assert tags == {
        "Request": "request",
        "Reply": "reply",
        "Verify": "verify",
        "Verdict": "verdict",
        "Release": "release",
        "Busy": "busy",
        "Failure": "failure",
        "Cancel": "cancel",
        "Probe": "probe",
        "Echo": "echo",
        "NodeStatus": "status",
        "Fetch": "fetch",
        "Part": "part",
    }


@pytest.mark.parametrize("name", ["fashion", "1.0.0", "s1-q4", "Edge_2", "x" * 64, "0"])
def test_names_that_pass(name: str) -> None:
    """Letters, digits, dot, dash and underscore: what is safe in a topic, a file name and a log."""
    assert msgspec.convert(name, Name) == name


@pytest.mark.parametrize(
    "name", ["", "x" * 65, ".hidden", "-flag", "_x", "a/b", "a+", "#", "a b", "a\n", "\na", "é", "a\0"]
)
def test_names_that_do_not(name: str) -> None:
    """Whatever could be a wildcard, a path, an option or a second line is refused."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(name, Name)


def test_a_request_stays_small() -> None:
    """The header must not outweigh the features: fewer than 128 bytes with usual names."""
    request = Request(bytes(16), "device-0123456789ab", "fashion", "1.0.0", "s1", "s1-q4", 1000.0)
    assert len(msgspec.msgpack.encode(request)) < 128
