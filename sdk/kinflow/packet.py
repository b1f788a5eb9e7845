"""PUBLISH at QoS 0 of MQTT 5 <-> bytes. No I/O.

The fast path of mqtt.py needs just this one packet. MQTT 5.0 (OASIS), 3.3: fixed header `0011000r`
(r = retain), the remaining length as a variable byte integer, u16 topic length, topic, properties
with their length as a variable byte integer, payload.
"""

from __future__ import annotations

import struct

from kinflow.errors import FrameError

# The longest fixed header: one byte, and four of remaining length.
MAX_FIXED_HEADER_BYTES = 5
_PUBLISH = 0x30
_TYPE_DUP_AND_QOS = 0xFE
_TOPIC_LENGTH = struct.Struct(">H")


def publish_header(topic: bytes, payload_bytes: int, retain: bool) -> bytes:
    """Everything of a PUBLISH before its payload; without properties."""
    out = bytearray((_PUBLISH | retain,))
    remaining = 3 + len(topic) + payload_bytes
    while remaining > 127:
        out.append(remaining & 127 | 128)
        remaining >>= 7
    out.append(remaining)
    out += _TOPIC_LENGTH.pack(len(topic))
    out += topic
    out.append(0)
    return bytes(out)


def is_publish(first_byte: int) -> bool:
    """Whether a packet that begins with `first_byte` is a PUBLISH at QoS 0, retained or not."""
    return first_byte & _TYPE_DUP_AND_QOS == _PUBLISH


def packet_bytes(head: bytes) -> int | None:
    """Size of the whole packet that begins with `head`; None when `head` ends too early to tell.

    Raises FrameError when the length takes more than the four bytes that MQTT allows.
    """
    value = shift = 0
    for position, byte in enumerate(head[1:MAX_FIXED_HEADER_BYTES], start=2):
        value |= (byte & 127) << shift
        if byte < 128:
            return position + value
        shift += 7
    if len(head) >= MAX_FIXED_HEADER_BYTES:
        raise FrameError("an MQTT packet's length has more than four bytes: not an MQTT broker?")
    return None


def split_publish(packet: bytes | bytearray) -> tuple[str, memoryview]:
    """Topic and payload (a view) of one whole PUBLISH at QoS 0; properties are skipped. Raises FrameError."""
    try:
        position = _after_variable_length(packet, 1)
        topic_end = position + 2 + _TOPIC_LENGTH.unpack_from(packet, position)[0]
        topic = packet[position + 2 : topic_end].decode()
        payload_start = _after_properties(packet, topic_end)
    except (struct.error, IndexError, UnicodeDecodeError) as exc:
        raise FrameError(f"a PUBLISH packet of {len(packet)} bytes is malformed: {exc}") from exc
    if payload_start > len(packet):
        raise FrameError(f"a PUBLISH packet of {len(packet)} bytes announces more than it holds")
    return topic, memoryview(packet)[payload_start:]


def _after_variable_length(packet: bytes | bytearray, position: int) -> int:
    while packet[position] > 127:
        position += 1
    return position + 1


def _after_properties(packet: bytes | bytearray, position: int) -> int:
    length = shift = 0
    while True:
        byte = packet[position]
        position += 1
        length |= (byte & 127) << shift
        if byte < 128:
            return position + length
        shift += 7
