"""The only place with topic strings.

    kinflow/v1/<tier>/<family>/<split>/req/<client>         a client's requests for any server of that tier
    kinflow/v1/node/<node>/<family>/<split>/req/<client>    for this server alone; and its probes and cancels
    kinflow/v1/<tier>/<family>/_bundle/req/<client>         for files of the bundle
    kinflow/v1/reply/<client>                               one client's replies
    kinflow/v1/node/<node>/status                           retained, last will "offline"

The tier stands in the topic because edge and cloud servers may share one broker: with the tier only in
the name of the shared subscription, both groups would take every request (docs/decisions/0001-tier-in-topic.md).
Client and node are the names in their certificates under TLS: a broker's access list compares them.
"""

from __future__ import annotations

from typing import Literal

from kinflow.messages import Tier

ROOT = "kinflow/v1"
_BUNDLE = "_bundle"
ALL_STATUS = f"{ROOT}/node/+/status"


def request(tier: Tier | Literal["+"], family: str, split: str, client: str) -> str:
    """Where a client's request goes that any server of `tier` may take."""
    return f"{ROOT}/{tier}/{family}/{split}/req/{client}"


def requests(tier: Tier, family: str, split: str, group: str) -> str:
    """What a server subscribes to: the broker gives each request to one server of the group.

    Without a group the broker gives every request to every server.
    """
    pattern = request(tier, family, split, "+")
    return f"$share/{group}/{pattern}" if group else pattern


def request_to(node: str, family: str, split: str, client: str) -> str:
    """Where a client's request goes that only this server may take."""
    return f"{ROOT}/node/{node}/{family}/{split}/req/{client}"


def client_of(topic: str) -> str:
    """Whose request came on this topic."""
    return topic.rpartition("/")[2]


def family_of(topic: str) -> str:
    """Whose model a request on this topic is for."""
    return topic.split("/")[-4]


def bundle(tier: Tier, family: str, client: str) -> str:
    """Where a client asks for files of a bundle. No split can have this name."""
    return request(tier, family, _BUNDLE, client)


def bundle_requests(tier: Tier, family: str, group: str) -> str:
    """What a server subscribes to for `bundle`."""
    return requests(tier, family, _BUNDLE, group)


def asks_for_bundle(topic: str) -> bool:
    return topic.split("/")[-3] == _BUNDLE


def reply(client: str) -> str:
    return f"{ROOT}/reply/{client}"


def status(node: str) -> str:
    return f"{ROOT}/node/{node}/status"


# Of a device itself, on the broker that its owner names (`kinflow device`): for people and Home Assistant, no protocol.


def device_state(device: str) -> str:
    """Its last answer, as JSON; retained."""
    return f"kinflow/device/{device}/state"


def device_online(device: str) -> str:
    """`online` or, by its last will, `offline`; retained."""
    return f"kinflow/device/{device}/online"
