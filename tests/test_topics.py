"""Topic strings: fixed, and matched by the subscriptions that wait for them."""

from __future__ import annotations

from paho.mqtt.client import topic_matches_sub

from kinflow import topics


def test_topics_are_what_the_protocol_says() -> None:
    """Another language's client depends on these very strings."""
    assert topics.request("edge", "fashion", "s1") == "kinflow/v1/edge/fashion/s1/req"
    assert topics.shared_requests("cloud", "fashion", "s2") == "$share/cloud/kinflow/v1/cloud/fashion/s2/req"
    assert topics.request_to("edge-1", "fashion", "s1") == "kinflow/v1/node/edge-1/fashion/s1/req"
    assert topics.reply("device-1") == "kinflow/v1/reply/device-1"
    assert topics.status("edge-1") == "kinflow/v1/node/edge-1/status"
    assert topics.ALL_STATUS == "kinflow/v1/node/+/status"


def test_a_shared_subscription_takes_its_own_tiers_requests_only() -> None:
    """Edge and cloud servers on one broker never take each other's requests."""
    group, _, pattern = topics.shared_requests("edge", "fashion", "s1").removeprefix("$share/").partition("/")
    assert group == "edge"
    assert topic_matches_sub(pattern, topics.request("edge", "fashion", "s1"))
    for other in (("cloud", "fashion", "s1"), ("edge", "other", "s1"), ("edge", "fashion", "s2")):
        assert not topic_matches_sub(pattern, topics.request(*other))


def test_the_status_wildcard_takes_every_status_and_nothing_else() -> None:
    """One subscription follows all nodes, without seeing requests or replies."""
    assert topic_matches_sub(topics.ALL_STATUS, topics.status("edge-1"))
    assert not topic_matches_sub(topics.ALL_STATUS, topics.reply("edge-1"))
    assert not topic_matches_sub(topics.ALL_STATUS, topics.request("edge", "fashion", "s1"))
    assert not topic_matches_sub(topics.ALL_STATUS, topics.request_to("edge-1", "fashion", "s1"))
