"""The only place with topic strings.

    kinflow/v1/<tier>/<family>/<split>/req    a request for any server of that tier
    kinflow/v1/node/<node id>/<family>/<split>/req    a request for this server alone, or its probe or cancel
    kinflow/v1/reply/<client id>              one client's replies
    kinflow/v1/node/<node id>/status          retained, last will "offline"

The tier stands in the topic because edge and cloud servers may share one broker: with the tier only in
the name of the shared subscription, both groups would take every request (docs/decisions/0001-tier-in-topic.md).
"""

from __future__ import annotations

from kinflow.messages import Tier

ROOT = "kinflow/v1"
ALL_STATUS = f"{ROOT}/node/+/status"


def request(tier: Tier, family: str, split: str) -> str:
    """Where a request goes that any server of `tier` may take."""
    return f"{ROOT}/{tier}/{family}/{split}/req"


def shared_requests(tier: Tier, family: str, split: str) -> str:
    """What a server subscribes to: the broker gives each request to one server of the group."""
    return f"$share/{tier}/{request(tier, family, split)}"


def request_to(node: str, family: str, split: str) -> str:
    """Where a request goes that only this server may take."""
    return f"{ROOT}/node/{node}/{family}/{split}/req"


def reply(client_id: str) -> str:
    return f"{ROOT}/reply/{client_id}"


def status(node: str) -> str:
    return f"{ROOT}/node/{node}/status"


# Of a device itself, on the broker that its owner names (`kinflow device`): for people and Home Assistant, no protocol.


def device_state(device: str) -> str:
    """Its last answer, as JSON; retained."""
    return f"kinflow/device/{device}/state"


def device_online(device: str) -> str:
    """`online` or, by its last will, `offline`; retained."""
    return f"kinflow/device/{device}/online"
