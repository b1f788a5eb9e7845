"""The entities of a device for Home Assistant, as its "MQTT discovery" page describes them. Pure."""

from __future__ import annotations

import json
from typing import Any, get_args

from kinflow import __version__, topics
from kinflow.messages import Tier

ONLINE, OFFLINE = b"online", b"offline"


def birth_topic(prefix: str) -> str:
    """Where Home Assistant says `online` when it has started."""
    return f"{prefix}/status"


def announcement(prefix: str, device: str, model: str, labels: list[str]) -> list[tuple[str, bytes]]:
    """(topic, payload) of each entity: answer, confidence, tier, temperature, online. To be retained."""
    shared = {
        "device": {
            "identifiers": [f"kinflow_{device}"],
            "name": device,
            "manufacturer": "kinflow",
            "model": model,
            "sw_version": __version__,
        },
        "origin": {"name": "kinflow", "sw_version": __version__},
    }
    state = {
        "state_topic": topics.device_state(device),
        "availability_topic": topics.device_online(device),
    }
    entities: list[tuple[str, str, dict[str, Any]]] = [
        ("sensor", "answer", _answer(labels) | state | {"json_attributes_topic": topics.device_state(device)}),
        (
            "sensor",
            "confidence",
            {
                "value_template": "{{ (value_json.confidence * 100) | round(1) }}",
                "unit_of_measurement": "%",
                "state_class": "measurement",
                **state,
            },
        ),
        (
            "sensor",
            "tier",
            {
                "value_template": "{{ value_json.tier }}",
                "device_class": "enum",
                "options": list(get_args(Tier)),
                **state,
            },
        ),
        (
            "sensor",
            "temperature",
            {
                "value_template": "{{ value_json.temperature_c }}",
                "device_class": "temperature",
                "unit_of_measurement": "°C",
                "state_class": "measurement",
                "entity_category": "diagnostic",
                **state,
            },
        ),
        (
            "binary_sensor",
            "online",
            {
                "state_topic": topics.device_online(device),
                "payload_on": ONLINE.decode(),
                "payload_off": OFFLINE.decode(),
                "device_class": "connectivity",
                "entity_category": "diagnostic",
            },
        ),
    ]
    return [
        (
            f"{prefix}/{component}/kinflow_{device}/{name}/config",
            json.dumps({"name": name.capitalize(), "unique_id": f"kinflow_{device}_{name}", **own, **shared}).encode(),
        )
        for component, name, own in entities
    ]


# Home Assistant takes states of at most 255 characters; a list of a thousand options would be a burden for it.
_MAX_STATE, _MAX_OPTIONS = 255, 50


def _answer(labels: list[str]) -> dict[str, Any]:
    if len(labels) <= _MAX_OPTIONS and all(len(label) <= _MAX_STATE for label in labels):
        return {"value_template": "{{ value_json.label }}", "device_class": "enum", "options": labels}
    return {"value_template": f"{{{{ value_json.label[:{_MAX_STATE}] }}}}"}
