"""Writes settings.md from the structs in kinflow/settings.py: `python docs/make_settings.py`.

With `--check` it writes nothing and ends with status 1 when the page is stale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from kinflow import settings

PAGE = Path(__file__).with_name("settings.md")

HEAD = """\
# Settings

Made by `python docs/make_settings.py` from `sdk/kinflow/settings.py`; do not edit.

Each role reads one TOML file, once, when its command starts. The first that is found wins:

1. the file that `--settings` names;
2. `./kinflow-<role>.toml`;
3. `~/.config/kinflow/<role>.toml`;
4. `/etc/kinflow/<role>.toml`.

A role is `device`, `edge` or `cloud`. Without a file the defaults hold. A flag of the command overrides its key.
An unknown key, a wrong type or a value out of range stops the command with a line that names file, key and value.
An app passes the same keys to `kinflow.DeviceSettings(…)`; no file is read then.
"""

DEVICE_EXAMPLE = """
```toml
# kinflow-device.toml
backend = "tflite"
deadline_s = 0.3
broker = "192.0.2.20:1883"
```
"""

SERVER_EXAMPLE = """
```toml
# kinflow-edge.toml
bundles = ["families/fashion/bundle"]
upstream = "192.0.2.10:1883"
batch_size = 32

[broker]
listen = "0.0.0.0"

[http]
port = 9884

[tls]
folder = "/etc/kinflow/tls"
```
"""

TLS_EXAMPLE = """
```toml
# kinflow-device.toml
trusted_keys = ["ed25519:d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"]

[tls]
folder = "/etc/kinflow/tls"
```
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [
        HEAD,
        "\n## Role `device`\n\nThe SDK in an app, `kinflow run` and `kinflow device`.\n\n",
        table(settings.DeviceSettings),
        "\n### Table `[service]`\n\nWhat `kinflow device` does around the SDK ([boards](boards.md)).\n\n",
        table(settings.ServiceSettings),
        "\n### Table `[service.mqtt]`\n\nAnswers by MQTT, to a broker of your own.\n\n",
        table(settings.MqttSettings),
        "\n### Table `[text]`\n\nLanguage models ([generation](generation.md)).\n\n",
        table(settings.TextSettings),
        "\n### Table `[serve]`\n\nThe endpoint of `kinflow serve` ([generation](generation.md#kinflow-serve)).\n\n",
        table(settings.ServeSettings),
        DEVICE_EXAMPLE,
        "\n## Roles `edge` and `cloud`\n\n`kinflow edge` and `kinflow cloud`; `upstream` is for the edge.\n\n",
        table(settings.ServerSettings),
        "\n### Table `[broker]`\n\nThe broker of a server: a running one, or one that it starts and stops.\n\n",
        table(settings.BrokerSettings),
        "\n### Table `[http]`\n\nHealth and metrics of a server, over HTTP.\n\n",
        table(settings.HttpSettings),
        "\n### Table `[sessions]`\n\nGenerations of language models: what a server holds of them.\n\n",
        table(settings.SessionSettings),
        SERVER_EXAMPLE,
        "\n### Table `[tls]`\n\nFor every role. [Servers](servers.md#a-lan-with-tls) tells how to make the folder.\n\n",
        table(settings.TlsSettings),
        TLS_EXAMPLE,
    ]
    return "".join(parts)


def table(kind: type[msgspec.Struct]) -> str:
    """A row per key: type and limits, default, meaning."""
    schema = msgspec.json.schema(kind)
    properties = schema["$defs"][kind.__name__]["properties"]
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, spec in properties.items():
        if spec.get("type") == "object" or "$ref" in spec or "allOf" in spec:
            rows.append(f"| `[{key}]` | table | see below | {spec['description']} |")
            continue
        default = "none" if spec.get("default") is None else f"`{json.dumps(spec['default'])}`"
        rows.append(f"| `{key}` | {describe(spec)} | {default} | {spec['description']} |")
    return "\n".join(rows) + "\n"


def describe(spec: dict[str, Any]) -> str:
    """The type of one key, with its limits, in words."""
    if "anyOf" in spec:
        return describe(next(option for option in spec["anyOf"] if option.get("type") != "null"))
    if "enum" in spec:
        return " or ".join(f"`{value}`" for value in spec["enum"])
    if spec["type"] == "array":
        return f"list of {describe(spec['items'])}s"
    name = {"number": "number", "integer": "integer", "string": "string", "boolean": "boolean"}[spec["type"]]
    low = spec.get("minimum", spec.get("exclusiveMinimum"))
    if low is None:
        return name
    above = "above " if "exclusiveMinimum" in spec else ""
    return f"{name}, {above}{low} to {spec['maximum']}"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
