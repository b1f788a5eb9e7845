"""PUBLISH packets: what is built is what MQTT 5 says, and what comes in may be anything."""

from __future__ import annotations

import socket

import pytest

from kinflow import packet
from kinflow.errors import FrameError
from kinflow.stream import Inbox, OtherPacket, Outbox

PINGRESP = b"\xd0\x00"


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    left, right = socket.socketpair()
    for sock in (left, right):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    with left, right:
        yield left, right


def test_header_is_the_one_of_the_standard() -> None:
    """Type, remaining length, topic and the empty properties stand where MQTT 5.0, 3.3 puts them."""
    assert packet.publish_header(b"a/b", 2, retain=True) + b"hi" == b"\x31\x08\x00\x03a/b\x00hi"


@pytest.mark.parametrize("size", [0, 1, 121, 122, 127, 128, 16_377, 16_378, 2_097_145, 2_097_146])
def test_round_trip_at_every_length_of_the_length(size: int) -> None:
    """Payload sizes on both sides of 1, 2, 3 and 4 length bytes come back as they went."""
    payload = bytes(size)
    whole = packet.publish_header("é".encode(), size, retain=False) + payload
    assert packet.packet_bytes(whole[: packet.MAX_FIXED_HEADER_BYTES]) == len(whole)
    assert packet.split_publish(whole) == ("é", payload)


def test_properties_are_skipped() -> None:
    """A broker may add properties, as long ones as it likes; the payload begins after them."""
    properties = b"\x26\x00\x01k\x00\xc8" + b"v" * 200
    body = b"\x00\x01t" + bytes((len(properties) & 127 | 128, len(properties) >> 7)) + properties + b"data"
    whole = b"\x30" + bytes((len(body) & 127 | 128, len(body) >> 7)) + body
    assert packet.split_publish(whole) == ("t", b"data")


def test_every_truncation_is_a_frame_error() -> None:
    """A PUBLISH cut off inside its topic or properties raises FrameError, never anything else."""
    whole = packet.publish_header(b"topic", 0, retain=False)
    for end in range(1, len(whole)):
        with pytest.raises(FrameError):
            packet.split_publish(whole[:end])


@pytest.mark.parametrize("body", [b"\x00\x02\xff\xfe\x00", b"\x00\x01t\x05", b"\x00\x01t\xff\xff\xff\xff"])
def test_malformed_bodies_are_frame_errors(body: bytes) -> None:
    """A topic that is not UTF-8, and properties longer than the packet, raise FrameError."""
    with pytest.raises(FrameError):
        packet.split_publish(bytes((0x30, len(body))) + body)


def test_length_of_five_bytes_is_refused_and_a_short_one_waits() -> None:
    """A length that goes on past four bytes is no MQTT; one that has not come yet is not an error."""
    with pytest.raises(FrameError, match="four bytes"):
        packet.packet_bytes(b"\x30\xff\xff\xff\xff\x01")
    assert packet.packet_bytes(b"\x30\xff") is None


def test_only_qos_0_is_a_publish_of_ours() -> None:
    """QoS 1, a duplicate and other packet types are left to paho."""
    assert [packet.is_publish(first) for first in (0x30, 0x31, 0x32, 0x38, 0xD0)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_inbox_leaves_other_packets_on_the_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    """Of a PUBLISH and a PINGRESP, the first is taken whole and the second not touched."""
    left, right = pair
    left.send(packet.publish_header(b"t", 3, retain=False) + b"abc" + PINGRESP)
    inbox = Inbox(limit_bytes=1024)
    whole = inbox.receive(right)
    assert whole is not None
    assert packet.split_publish(whole) == ("t", b"abc")
    with pytest.raises(OtherPacket):
        inbox.receive(right)
    assert right.recv(10) == PINGRESP


def test_inbox_puts_pieces_together(pair: tuple[socket.socket, socket.socket]) -> None:
    """A packet that comes in pieces is complete with the last one, and its end inside is an error."""
    left, right = pair
    whole = packet.publish_header(b"t", 300, retain=False) + bytes(300)
    inbox = Inbox(limit_bytes=1024)
    for start in range(0, len(whole), 100):
        assert inbox.receive(right) is None
        left.send(whole[start : start + 100])
    assert inbox.receive(right) == whole
    left.send(whole[:50])
    assert inbox.receive(right) is None
    left.close()
    with pytest.raises(ConnectionResetError):
        inbox.receive(right)


def test_inbox_throws_away_what_is_too_long(pair: tuple[socket.socket, socket.socket]) -> None:
    """A packet over the limit passes without being kept; the next one is read as if nothing had been."""
    left, right = pair
    inbox = Inbox(limit_bytes=64)
    left.send(packet.publish_header(b"t", 1000, retain=False) + bytes(1000) + packet.publish_header(b"u", 0, False))
    received = [inbox.receive(right) for _ in range(20)]
    assert [packet.split_publish(whole) for whole in received if whole] == [("u", b"")]


def test_outbox_keeps_order_over_a_full_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    """What a full socket does not take waits, in order and whole, until it is flushed."""
    left, right = pair
    outbox = Outbox()
    payloads = [bytes([n]) * 5000 for n in range(20)]
    for payload in payloads:
        outbox.send(left, (packet.publish_header(b"t", len(payload), retain=False), payload))
    assert outbox.size > 0
    inbox, got = Inbox(limit_bytes=8192), []
    while len(got) < len(payloads):
        outbox.flush(left)
        if whole := inbox.receive(right):
            got.append(packet.split_publish(whole)[1])
    assert got == payloads
    assert (outbox.size, outbox.begun) == (0, False)
