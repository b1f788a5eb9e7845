"""Settings: frozen structs, read once, in the command, from one TOML file per role.

Looked for, first found wins: the file named by `--settings`, `./kinflow-<role>.toml`,
`~/.config/kinflow/<role>.toml`, `/etc/kinflow/<role>.toml`; without any, the defaults hold.
docs/settings.md lists every key; a flag of the command overrides its key.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from kinflow.backends import Accelerator
from kinflow.errors import SettingsError
from kinflow.manifest import BackendName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _doc(text: str, **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, **limits)


# A name that may stand in a topic, as messages.py's are.
_NAME_OR_NONE = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?\Z"

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all below."""


class TlsSettings(_Settings, frozen=True):
    """Who this is and whom it trusts."""

    folder: Annotated[
        str,
        _doc("Folder with `ca.pem`, `cert.pem`, `key.pem`, as `kinflow pki issue` makes it; empty: no TLS."),
    ] = ""
    server: Annotated[
        str, _doc("The only server to connect to, such as `edge.kitchen`; empty: any of the family's authority.")
    ] = ""
    insecure_lan: Annotated[bool, _doc("Allow connections beyond loopback without TLS.")] = False


Topic = Annotated[str, msgspec.Meta(pattern=r"^[^+#/\x00]+(/[^+#/\x00]+)*\Z", max_length=200)]


class MqttSettings(_Settings, frozen=True):
    """Answers of `kinflow device` by MQTT: the owner's broker, not the one between device and server."""

    broker: Annotated[str, _doc("`host:port` of the broker that gets the answers; empty: none.")] = ""
    username: Annotated[str, _doc("User name there; empty: none is given.")] = ""
    password_file: Annotated[str, _doc("File with the password, and nothing else.")] = ""
    home_assistant: Annotated[bool, _doc("Announce the device to Home Assistant.")] = False
    discovery_prefix: Annotated[Topic, _doc("Home Assistant's discovery prefix.")] = "homeassistant"


class ServiceSettings(_Settings, frozen=True):
    """What `kinflow device` does around the SDK; an app of one's own does not look at it."""

    bundle: Annotated[str, _doc("Folder or .zip of the family; empty: families/fashion/bundle.")] = ""
    name: Annotated[
        str, _doc("The device's name in its answers and topics; empty: the host name.", pattern=_NAME_OR_NONE)
    ] = ""
    source: Annotated[str, _doc("Where frames come from: `kinflow device --help` lists the kinds.")] = "-"
    rate_hz: Annotated[float, _doc("Frames looked at per second; 0: as many as it can.", ge=0, le=1000)] = 1.0
    stall_s: Annotated[float, _doc("A camera without a frame for so long is an error, seconds.", gt=0, le=3600)] = 30.0
    output: Annotated[str, _doc("File that answers are added to; `-`: standard output; empty: none.")] = "-"
    board: Annotated[bool, _doc("A hot, throttled or busy board offloads earlier.")] = True
    mqtt: Annotated[MqttSettings, _doc("Answers by MQTT.")] = MqttSettings()


class TextSettings(_Settings, frozen=True):
    """Language models: `kinflow chat`, `generate` and `serve`."""

    mode: Annotated[Literal["family", "exact", "confident", "local"], _doc("Whose text it is: docs/generation.md.")] = (
        "family"
    )
    max_tokens: Annotated[int, _doc("Longest text where nothing else is asked for, tokens.", ge=1, le=32768)] = 512
    max_drafts: Annotated[int, _doc("Most drafts in one verification; 0: none.", ge=0, le=64)] = 8
    draft_floor: Annotated[float, _doc("A draft that stands with less than this chance is not sent.", ge=0, le=1)] = 0.1
    verify_timeout_s: Annotated[
        float, _doc("A server that takes longer for a few drafts is left, seconds.", gt=0, le=3600)
    ] = 5.0


class ServeSettings(_Settings, frozen=True):
    """The OpenAI-compatible endpoint of `kinflow serve`."""

    bundle: Annotated[str, _doc("Folder or .zip of the language model; empty: families/smollm2/bundle.")] = ""
    listen: Annotated[str, _doc("IPv4 address that is bound. Loopback unless told otherwise.")] = "127.0.0.1"
    port: Annotated[Port, _doc("Port that is bound; 0: any free one.")] = 8080
    key_file: Annotated[str, _doc("File with the API key that clients must send, and nothing else; empty: none.")] = ""
    certificate: Annotated[str, _doc("PEM file with the certificate chain for https; empty: plain http.")] = ""
    certificate_key: Annotated[str, _doc("PEM file with its private key.")] = ""
    models: Annotated[
        list[str], _doc("Other names of models that are answered, such as `gpt-4o-mini`, beside the family's own.")
    ] = []
    parallel: Annotated[int, _doc("Texts generated at the same time; above it the answer is 429.", ge=1, le=256)] = 4


class DeviceSettings(_Settings, frozen=True):
    """Role `device`: the SDK in an app, `kinflow run` and `kinflow device`."""

    backend: Annotated[BackendName, _doc("Runtime of the device member: `onnx` or `tflite`.")] = "onnx"
    member: Annotated[str, _doc("The member that runs here.")] = "device"
    threads: Annotated[int, _doc("Threads of the runtime.", ge=1, le=64)] = 1
    accelerator: Annotated[
        Accelerator,
        _doc("Where ONNX Runtime computes; `auto`: on TensorRT, else CUDA, else the CPU, by what is there."),
    ] = "cpu"
    engine_cache: Annotated[str, _doc("Folder where TensorRT keeps its engines; empty: it builds them anew.")] = ""
    tuned: Annotated[
        str, _doc("File of `kinflow tune` with `backend`, `accelerator` and `threads`; keys beside this one win.")
    ] = ""
    deadline_s: Annotated[float, _doc("Default time in which an answer must come, seconds.", gt=0, le=3600)] = 1.0
    threshold: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=1)] | None,
        _doc("Keep answers at this confidence or above; without it, the bundle's certificate."),
    ] = None
    codec: Annotated[str, _doc("Codec of the features that leave; empty: the split's default.")] = ""
    offload: Annotated[bool, _doc("False: never use the network.")] = True
    broker: Annotated[
        str, _doc("`host:port` of a server's broker, or several with commas between; empty: find them by zeroconf.")
    ] = ""
    cloud: Annotated[
        str, _doc("`host:port` of the cloud's broker, asked directly when no edge server can be; with commas, several.")
    ] = ""
    interfaces: Annotated[list[str], _doc("IPv4 addresses whose networks are searched; empty: all of them.")] = []
    audit_share: Annotated[
        float,
        _doc("Share of all images whose kept answer is compared with a server's, when idle; 0: none.", ge=0, le=1),
    ] = 0.0
    outbox: Annotated[
        str,
        _doc('File where inputs wait for a server that were submitted with `when="eventually"`; empty: there is none.'),
    ] = ""
    outbox_size: Annotated[int, _doc("Most inputs that wait there.", ge=1, le=1_000_000)] = 1000
    workers: Annotated[int, _doc("How many `submit()` calls run at the same time.", ge=1, le=256)] = 4
    trusted_keys: Annotated[
        list[str],
        _doc("Keys of which one must have signed a bundle, as `kinflow sign` shows them; empty: any bundle is taken."),
    ] = []
    tls: Annotated[TlsSettings, _doc("Who this device is and whom it trusts.")] = TlsSettings()
    text: Annotated[TextSettings, _doc("How text is generated.")] = TextSettings()
    serve: Annotated[ServeSettings, _doc("Where `kinflow serve` listens.")] = ServeSettings()
    service: Annotated[ServiceSettings, _doc("What `kinflow device` does.")] = ServiceSettings()


class Tuned(_Settings, frozen=True):
    """What `kinflow tune` writes: the fastest way to run one family's device member on one board."""

    backend: BackendName
    accelerator: Accelerator
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)]
    family: str
    """Id and version that were measured."""
    board: str


class BrokerSettings(_Settings, frozen=True):
    """The MQTT broker that a server uses: a running one, or one that it starts and stops itself."""

    address: Annotated[str, _doc("`host:port` of a running broker; empty: start one.")] = ""
    kind: Annotated[
        str,
        _doc(
            "What to start: `mosquitto`, `embedded`, or `auto` (mosquitto where installed).",
            pattern=r"^(auto|mosquitto|embedded)\Z",
        ),
    ] = "auto"
    listen: Annotated[str, _doc("IPv4 address that the started broker binds. Loopback unless told otherwise.")] = (
        "127.0.0.1"
    )
    port: Annotated[Port, _doc("Port that the started broker binds; 0: any free one.")] = 1883
    servers: Annotated[
        list[str], _doc("Under TLS: the other servers that use the started broker, such as `edge.attic`.")
    ] = []
    group: Annotated[
        str,
        _doc(
            "Group of servers that share a broker's requests; empty: the tier. Where several share one under TLS, a "
            "secret name, the same for all: who knows it can make requests vanish.",
            pattern=_NAME_OR_NONE,
        ),
    ] = ""


class HttpSettings(_Settings, frozen=True):
    """Where a server answers `/live`, `/ready` and `/metrics`."""

    listen: Annotated[str, _doc("IPv4 address that is bound. Loopback unless told otherwise.")] = "127.0.0.1"
    port: Annotated[Port, _doc("Port that is bound; 0: any free one, which the server says when it is ready.")] = 0


class SessionSettings(_Settings, frozen=True):
    """What a server holds of generations, for families of the task `text-generation`."""

    most: Annotated[int, _doc("Most sessions held at once.", ge=1, le=100_000)] = 256
    per_client: Annotated[
        int, _doc("Most sessions of one client; an edge server is one client of its cloud.", ge=1, le=100_000)
    ] = 64
    cache_mb: Annotated[int, _doc("Memory of all sessions' attention caches, MB.", ge=1, le=1 << 20)] = 1024
    idle_s: Annotated[float, _doc("A session that was not used for so long is forgotten, seconds.", gt=0, le=86400)] = (
        120.0
    )
    keep_s: Annotated[
        float,
        _doc("A session that was used within this time does not make room for another one, seconds.", ge=0, le=86400),
    ] = 10.0
    chunk: Annotated[
        int, _doc("Positions of one session in a pass: a long prompt holds up others for so many.", ge=16, le=4096)
    ] = 64


class ServerSettings(_Settings, frozen=True):
    """Roles `edge` and `cloud`."""

    node: Annotated[
        str, _doc("Name of this server, unique on its network; empty: host name and tier.", pattern=_NAME_OR_NONE)
    ] = ""
    bundles: Annotated[list[str], _doc("Bundles to serve: folders or .zip files; empty: families/fashion/bundle.")] = []
    member: Annotated[str, _doc("Member to run; empty: the one named like the tier.")] = ""
    threads: Annotated[int, _doc("Threads of the runtime.", ge=1, le=256)] = 1
    batch_size: Annotated[int, _doc("Most requests computed as one batch.", ge=1, le=1024)] = 16
    batch_wait_ms: Annotated[
        float,
        _doc(
            "How long a batch that is not full waits for more; 0: take what has come meanwhile.",
            ge=0,
            le=1000,
        ),
    ] = 0.0
    queue_size: Annotated[int, _doc("Most requests waiting; above it the answer is Busy.", ge=1, le=100_000)] = 1024
    queue_size_per_device: Annotated[
        int, _doc("Most requests of one device waiting; above it that device is told Busy.", ge=1, le=100_000)
    ] = 256
    requests_per_s_per_device: Annotated[
        float,
        _doc(
            "Most messages of one device in a second; above it requests are told Busy, all else is dropped. "
            "An edge server with all of its devices is one to the cloud server.",
            ge=1,
            le=1e6,
        ),
    ] = 2000.0
    drain_s: Annotated[
        float,
        _doc(
            "How long a server that is told to stop waits at most until its devices have moved, seconds.", ge=0, le=600
        ),
    ] = 3.0
    pull_bytes_per_s: Annotated[
        float, _doc("Bytes of a bundle that one device may take in a second.", ge=65536, le=1e9)
    ] = 8e6
    upstream: Annotated[
        str, _doc("`host:port` of the next tier's broker, or several with commas between; empty: nothing above.")
    ] = ""
    advertise: Annotated[bool, _doc("Announce this server by zeroconf.")] = True
    interfaces: Annotated[
        list[str], _doc("IPv4 addresses announced and used for zeroconf; empty: those that the broker binds.")
    ] = []
    status_interval_s: Annotated[float, _doc("How often the retained status is renewed, seconds.", gt=0, le=60)] = 1.0
    broker: Annotated[BrokerSettings, _doc("The broker this server uses.")] = BrokerSettings()
    http: Annotated[HttpSettings, _doc("Where its health and metrics are read.")] = HttpSettings()
    sessions: Annotated[SessionSettings, _doc("What it holds of generations.")] = SessionSettings()
    trusted_keys: Annotated[
        list[str],
        _doc("Keys of which one must have signed a bundle, as `kinflow sign` shows them; empty: any bundle is taken."),
    ] = []
    tls: Annotated[TlsSettings, _doc("Who this server is and whom it trusts.")] = TlsSettings()


S = TypeVar("S", bound=_Settings)


def search_paths(role: str) -> list[Path]:
    """Where a role's settings file is looked for, in order."""
    name = f"{role}.toml"
    # Not Path.home(), which raises where there is none: a service may run as a user without an entry.
    home = Path(os.path.expanduser("~"))
    return [Path(f"kinflow-{name}"), home / ".config/kinflow" / name, Path("/etc/kinflow") / name]


def load(role: str, kind: type[S], file: Path | None = None, **flags: Any) -> S:
    """The settings of `role`: the file's keys, overridden by the flags that are not None.

    A flag's name is its key; a key of a table is written `table__key`. Raises SettingsError that names the file,
    the key and the value.
    """
    path = file or next((path for path in search_paths(role) if path.is_file()), None)
    keys: dict[str, Any] = _read(path) if path is not None else {}
    source = str(path) if path is not None else "flags"
    for name, value in flags.items():
        if value is not None:
            *tables, key = name.split("__")
            target = keys
            for table in tables:
                target = target.setdefault(table, {})
                if not isinstance(target, dict):
                    raise SettingsError(f"{source}: {table} must be a table")
            target[key] = value
    if tuned := keys.get("tuned"):
        keys = _tuned(Path(str(tuned))) | keys
    return _convert(keys, kind, source)


def _tuned(path: Path) -> dict[str, Any]:
    """What `kinflow tune` found out."""
    found = _convert(_read(path), Tuned, str(path))
    return {"backend": found.backend, "accelerator": found.accelerator, "threads": found.threads}


def write_tuned(path: Path, found: Tuned) -> None:
    """For the key `tuned`. Raises SettingsError when the file cannot be written; an old one is kept then."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in msgspec.structs.asdict(found).items()]
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text("# Written by `kinflow tune`.\n" + "\n".join(lines) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as exc:
        raise SettingsError(f"{path}: {exc.strerror}") from exc


def _read(path: Path) -> dict[str, Any]:
    try:
        keys: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return keys
    except OSError as exc:
        raise SettingsError(f"{path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path}: not valid TOML: {exc}") from exc


def _convert(keys: dict[str, Any], kind: type[S], source: str) -> S:
    try:
        return msgspec.convert(keys, kind)
    except msgspec.ValidationError as exc:
        raise SettingsError(f"{source}: {_explain(exc, keys)} (docs/settings.md lists the keys)") from exc


def _explain(error: msgspec.ValidationError, keys: dict[str, Any]) -> str:
    """msgspec's sentence, which names the key, with the value it means."""
    place = re.search(r" - at `\$\.(.+)`$", str(error))
    if place is None:
        return str(error)
    value: Any = keys
    for part in re.findall(r"\w+", place[1]):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return f"{place[1]} is {value!r}: {str(error)[: place.start()]}"
