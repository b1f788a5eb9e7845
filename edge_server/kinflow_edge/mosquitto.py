"""What mosquitto is told: its configuration and, under TLS, who may read and write which topics. Pure.

mosquitto 2.0 checks what a client publishes and what it is sent, not what it subscribes to: so a client may
subscribe to everything, and receives only what it may read.
"""

from __future__ import annotations

from collections.abc import Sequence

from kinflow import frame, topics
from kinflow.identity import Identity
from kinflow.tls import CA, CERT, CRL, KEY

ACL = "acl"
MAX_CONNECTIONS = 4096

_CONFIG = """\
listener {port} {listen}
set_tcp_nodelay true
max_connections {max_connections}
max_packet_size {max_packet_bytes}
max_inflight_messages 200
max_queued_messages 1000
persistence true
persistence_location ./
autosave_on_changes true
autosave_interval 1
log_type error
log_type warning
"""

_ANYBODY = "allow_anonymous true\n"

_CERTIFIED = f"""\
allow_anonymous false
require_certificate true
use_identity_as_username true
tls_version tlsv1.2
cafile {CA}
certfile {CERT}
keyfile {KEY}
acl_file {ACL}
"""


def configuration(listen: str, port: int, credentials: Sequence[str]) -> str:
    """`credentials`: the files there are; with any, only certified clients may connect, and the access list holds."""
    base = _CONFIG.format(
        listen=listen,
        port=port,
        max_connections=MAX_CONNECTIONS,
        max_packet_bytes=frame.MAX_FRAME_BYTES + 1024,
    )
    if not credentials:
        return base + _ANYBODY
    return base + _CERTIFIED + (f"crlfile {CRL}\n" if CRL in credentials else "")


def access_list(servers: Sequence[Identity]) -> str:
    """A client asks under its own identity and reads its own replies; `servers` take their tier's requests."""
    lines = [
        f"pattern write {topics.request('+', '+', '+', '%u')}",
        f"pattern write {topics.request_to('+', '+', '+', '%u')}",
        f"pattern read {topics.reply('%u')}",
        f"pattern read {topics.ALL_STATUS}",
    ]
    for server in servers:
        lines += [
            f"user {server}",
            f"topic read {topics.request(server.role, '+', '+', '+')}",
            f"topic read {topics.request_to(str(server), '+', '+', '+')}",
            f"topic write {topics.reply('+')}",
            f"topic write {topics.status(str(server))}",
        ]
    return "\n".join(lines) + "\n"
