"""Every error kinflow raises on purpose, and the code it travels under on the wire.

KinflowError
├── InputError           the app's input is not what the bundle's manifest asks for
├── SourceError          a camera, a stream or a folder gives no frames
├── SettingsError        a settings file or a flag is wrong
├── BundleError          a bundle is corrupt, foreign or incomplete
├── BackendError         a runtime is missing, or a graph failed in it
├── FrameError           bytes that are not a kinflow frame
├── CodecError           coded features that do not decode
├── FamilyMismatch       family, version, split or codec differ between the two sides
├── SessionLost          a server does not hold (any more) what a session builds on
├── Superseded           a verification followed another that did not end as it had thought
├── SessionLimit         a server holds as many sessions, or positions of one, as it may
├── BrokerError          no MQTT broker could be started or reached
├── OutboxError          what is to be sent later cannot be kept: the outbox is full, or its disk
├── DiscoveryError       zeroconf does not work on this machine, or an advert cannot be made
└── LinkError            nothing came back
    ├── LinkLost         there is no connection, or it broke
    ├── LinkTimeout      no reply before the deadline
    ├── RequestCancelled another node answered first, or the answer is not wanted any more
    ├── ServerBusy       the server's queue would miss the deadline
    └── ServerFailed     the server answered with a failure
"""

from __future__ import annotations

from typing import ClassVar


class KinflowError(Exception):
    """Base of all; `code` is what a Failure message carries."""

    code: ClassVar[str] = "internal"


class InputError(KinflowError):
    code = "input"


class SourceError(KinflowError):
    code = "source"


class SettingsError(KinflowError):
    code = "settings"


class BundleError(KinflowError):
    code = "bundle"


class BackendError(KinflowError):
    code = "backend"


class FrameError(KinflowError):
    code = "frame"


class CodecError(KinflowError):
    code = "codec"


class FamilyMismatch(KinflowError):
    code = "mismatch"


class SessionLost(KinflowError):
    code = "session-lost"


class Superseded(KinflowError):
    code = "superseded"


class SessionLimit(KinflowError):
    code = "session-limit"


class BrokerError(KinflowError):
    code = "broker"


class OutboxError(KinflowError):
    code = "outbox"


class DiscoveryError(KinflowError):
    code = "discovery"


class LinkError(KinflowError):
    code = "link"


class LinkLost(LinkError):
    code = "lost"


class LinkTimeout(LinkError):
    code = "timeout"


class RequestCancelled(LinkError):
    code = "cancelled"


class ServerBusy(LinkError):
    """`queue_ms` is how long the server says its queue is."""

    code = "busy"

    def __init__(self, node: str, queue_ms: float) -> None:
        super().__init__(f"{node} is busy: its queue is {queue_ms:.0f} ms long")
        self.node = node
        self.queue_ms = queue_ms


class ServerFailed(LinkError):
    """`failure_code` is the `code` of the error on the server."""

    code = "failed"

    def __init__(self, node: str, failure_code: str, message: str) -> None:
        super().__init__(f"{node} answered {failure_code!r}: {message}")
        self.node = node
        self.failure_code = failure_code
