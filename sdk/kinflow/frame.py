"""header + bytes <-> one MQTT payload. No I/O.

offset  size  field
0       4     magic b"KINF"
4       1     protocol version, 1
5       3     zero
8       4     header length H, little-endian unsigned
12      4     payload length P
16      H     header: one message as msgpack (messages.py)
16+H    P     payload: coded features, or nothing
16+H+P  4     crc32 (zlib's) of everything before it
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import msgspec

from kinflow.errors import FrameError
from kinflow.messages import Message

MAGIC = b"KINF"
VERSION = 1
MAX_HEADER_BYTES = 16 * 1024
MAX_PAYLOAD_BYTES = 4 * 1024 * 1024

_PREFIX = struct.Struct("<4sB3xII")
_CRC = struct.Struct("<I")
OVERHEAD_BYTES = _PREFIX.size + _CRC.size
MAX_FRAME_BYTES = OVERHEAD_BYTES + MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES

Buffer = bytes | memoryview

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class Frame(NamedTuple):
    message: Message
    payload: memoryview
    """A view of what was unpacked: features are large, and decoding copies them anyway."""


def pack(message: Message, payload: Buffer = b"") -> bytes:
    """One MQTT payload. Raises FrameError when the header or the payload is over its limit."""
    return b"".join(parts(message, payload))


def parts(message: Message, payload: Buffer) -> tuple[bytes, Buffer, bytes]:
    """What `pack` would join: the payload is not copied."""
    header = _encoder.encode(message)
    _check_sizes(len(header), len(payload))
    start = _PREFIX.pack(MAGIC, VERSION, len(header), len(payload)) + header
    return start, payload, _CRC.pack(zlib.crc32(payload, zlib.crc32(start)))


def unpack(data: Buffer) -> Frame:
    """The message and its payload. Raises FrameError on anything that is not a whole, valid frame."""
    if len(data) < OVERHEAD_BYTES:
        raise FrameError(f"a frame has at least {OVERHEAD_BYTES} bytes, got {len(data)}: truncated?")
    magic, version, header_bytes, payload_bytes = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise FrameError(f"a frame begins with {MAGIC!r}, got {magic!r}: something else uses this topic")
    if version != VERSION:
        raise FrameError(f"protocol version {VERSION} is spoken here, got {version}: update the older side")
    _check_sizes(header_bytes, payload_bytes)
    expected = OVERHEAD_BYTES + header_bytes + payload_bytes
    if len(data) != expected:
        raise FrameError(f"the frame announces {expected} bytes, got {len(data)}: truncated or padded")
    view = memoryview(data)
    end = expected - _CRC.size
    if _CRC.unpack_from(data, end)[0] != zlib.crc32(view[:end]):
        raise FrameError("crc32 differs: the frame was damaged on its way")
    start = _PREFIX.size + header_bytes
    try:
        message = _decoder.decode(view[_PREFIX.size : start])
    # ValidationError is a DecodeError; text that is not UTF-8 and nesting without end come as they are.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise FrameError(f"header: {exc}") from exc
    return Frame(message, view[start:end])


def _check_sizes(header_bytes: int, payload_bytes: int) -> None:
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"header is {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed")
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise FrameError(f"payload is {payload_bytes} bytes, at most {MAX_PAYLOAD_BYTES} are allowed")
