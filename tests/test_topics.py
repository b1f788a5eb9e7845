"""Topic strings: fixed, and matched by the subscriptions that wait for them."""

from __future__ import annotations

from paho.mqtt.client import topic_matches_sub

from kinflow import topics


def test_topics_are_what_the_protocol_says() -> None:
    """Another language's client depends on these very strings."""
    assert topics.request("edge", "fashion", "s1", "cam-1") == "kinflow/v1/edge/fashion/s1/req/cam-1"
    assert topics.requests("cloud", "fashion", "s2", "cloud") == "$share/cloud/kinflow/v1/cloud/fashion/s2/req/+"
    assert topics.requests("cloud", "fashion", "s2", "") == "kinflow/v1/cloud/fashion/s2/req/+"
    assert topics.request_to("edge-1", "fashion", "s1", "c") == "kinflow/v1/node/edge-1/fashion/s1/req/c"
    assert topics.reply("device-1") == "kinflow/v1/reply/device-1"
    assert topics.status("edge-1") == "kinflow/v1/node/edge-1/status"
    assert topics.ALL_STATUS == "kinflow/v1/node/+/status"


def test_a_shared_subscription_takes_its_own_tiers_requests_only() -> None:
    """Edge and cloud servers on one broker never take each other's requests."""
    group, _, pattern = topics.requests("edge", "fashion", "s1", "edge").removeprefix("$share/").partition("/")
    assert group == "edge"
    assert topic_matches_sub(pattern, topics.request("edge", "fashion", "s1", "cam-1"))
    for other in (("cloud", "fashion", "s1"), ("edge", "other", "s1"), ("edge", "fashion", "s2")):
        assert not topic_matches_sub(pattern, topics.request(*other, "cam-1"))


def test_the_status_wildcard_takes_every_status_and_nothing_else() -> None:
    """One subscription follows all nodes, without seeing requests or replies."""
    assert topic_matches_sub(topics.ALL_STATUS, topics.status("edge-1"))
    assert not topic_matches_sub(topics.ALL_STATUS, topics.reply("edge-1"))
    assert not topic_matches_sub(topics.ALL_STATUS, topics.request("edge", "fashion", "s1", "cam-1"))
    assert not topic_matches_sub(topics.ALL_STATUS, topics.request_to("edge-1", "fashion", "s1", "cam-1"))


def test_a_topic_tells_whose_request_it_is() -> None:
    """Servers compare it with the request's own field."""
    assert topics.client_of(topics.request("edge", "fashion", "s1", "device.cam-1")) == "device.cam-1"
    assert topics.client_of(topics.request_to("edge-1", "fashion", "s1", "device.cam-1")) == "device.cam-1"
