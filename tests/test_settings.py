"""Settings: places in order, flags above files, every mistake named with file, key and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kinflow import settings
from kinflow.errors import SettingsError
from kinflow.settings import BrokerSettings, DeviceSettings, ServerSettings, load, search_paths

KINDS = [DeviceSettings, ServerSettings, BrokerSettings]


@pytest.fixture(autouse=True)
def empty_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and a home without settings."""
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_places_are_looked_at_in_order(tmp_path: Path) -> None:
    """The working directory, then the user's configuration, then the machine's."""
    assert search_paths("edge") == [
        Path("kinflow-edge.toml"),
        tmp_path / "home/.config/kinflow/edge.toml",
        Path("/etc/kinflow/edge.toml"),
    ]


def test_the_first_file_found_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named file, working directory, home, machine; files are not merged; without any, the defaults hold."""
    machine = tmp_path / "etc/device.toml"
    monkeypatch.setattr(settings, "search_paths", lambda role: [*search_paths(role)[:2], machine])
    assert load("device", DeviceSettings) == DeviceSettings()
    write(machine, "threads = 5\nworkers = 9")
    assert load("device", DeviceSettings) == DeviceSettings(threads=5, workers=9)
    write(tmp_path / "home/.config/kinflow/device.toml", "threads = 4")
    assert load("device", DeviceSettings) == DeviceSettings(threads=4)
    write(tmp_path / "work/kinflow-device.toml", "threads = 3")
    assert load("device", DeviceSettings) == DeviceSettings(threads=3)
    named = write(tmp_path / "named.toml", "threads = 2")
    assert load("device", DeviceSettings, named) == DeviceSettings(threads=2)


def test_another_roles_file_is_not_read() -> None:
    """A device beside an edge server has settings of its own."""
    write(Path("kinflow-edge.toml"), "threads = 9")
    assert load("device", DeviceSettings).threads == 1


def test_a_user_without_a_home_gets_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service may run as a user that has no entry and no HOME."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 987654)
    assert load("device", DeviceSettings) == DeviceSettings()


def test_flags_override_keys(tmp_path: Path) -> None:
    """A flag that was given wins over the file, one that was not (None) leaves it alone, in tables too."""
    file = write(tmp_path / "e.toml", 'threads = 2\nqueue_size = 7\n[broker]\nkind = "embedded"\nport = 1884')
    loaded = load("edge", ServerSettings, file, threads=3, queue_size=None, broker__port=0, broker__listen=None)
    assert loaded == ServerSettings(threads=3, queue_size=7, broker=BrokerSettings(kind="embedded", port=0))
    assert load("edge", ServerSettings, None, broker__port=5).broker == BrokerSettings(port=5)
    assert load("device", DeviceSettings, None, offload=False, threshold=0.0) == DeviceSettings(
        offload=False, threshold=0.0
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("treads = 2", "unknown field `treads`"),
        ("[brocker]\nport = 1", "unknown field `brocker`"),
        ("[broker]\nprot = 1", "broker is {'prot': 1}: Object contains unknown field `prot`"),
        ("threads = 'two'", "threads is 'two': Expected `int`, got `str`"),
        ("threads = true", "threads is True: Expected `int`, got `bool`"),
        ("threads = 1.5", "threads is 1.5: Expected `int`"),
        ("threads = 0", "threads is 0: Expected `int` >= 1"),
        ("queue_size = 100001", "queue_size is 100001: Expected `int` <= 100000"),
        ("bundles = 'one'", "bundles is 'one': Expected `array`, got `str`"),
        ("bundles = ['a', 3]", r"bundles\[1\] is 3: Expected `str`, got `int`"),
        ("status_interval_s = nan", "status_interval_s is nan: "),
        ("status_interval_s = inf", "status_interval_s is inf: "),
        ("node = 'a/b'", "node is 'a/b': Expected `str` matching"),
        ('node = "a\\n"', r"node is 'a\\n': Expected `str` matching"),
        ("broker = 'host'", "broker is 'host': Expected `object`, got `str`"),
        ("[broker]\nport = 65536", "broker.port is 65536: Expected `int` <= 65535"),
        ("[broker]\nkind = 'best'", "broker.kind is 'best': Expected `str` matching"),
        ("threads = ", "not valid TOML"),
        ("threads = 1\nthreads = 2", "not valid TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    """The file, the key and the value, and where the keys are listed."""
    file = write(tmp_path / "e.toml", text)
    with pytest.raises(SettingsError, match=said) as caught:
        load("edge", ServerSettings, file)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"threads": 65}, "flags: threads is 65: "),
        ({"backend": "torch"}, "flags: backend is 'torch': "),
        ({"deadline_s": float("nan")}, "flags: deadline_s is nan: "),
        ({"threshold": 1.01}, "flags: threshold is 1.01: "),
        ({"no_such": 1}, "flags: Object contains unknown field `no_such`"),
    ],
)
def test_a_wrong_flag_is_named(flags: dict[str, Any], said: str) -> None:
    """Flags are checked like keys."""
    with pytest.raises(SettingsError, match=said):
        load("device", DeviceSettings, None, **flags)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, a folder, not UTF-8, a key where a table should be."""
    with pytest.raises(SettingsError, match=r"gone\.toml: No such file"):
        load("edge", ServerSettings, tmp_path / "gone.toml")
    with pytest.raises(SettingsError, match="directory"):
        load("edge", ServerSettings, tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'node = "\xe9"')
    with pytest.raises(SettingsError, match=r"latin\.toml: not valid TOML"):
        load("edge", ServerSettings, tmp_path / "latin.toml")
    file = write(tmp_path / "e.toml", "broker = 3")
    with pytest.raises(SettingsError, match=r"e\.toml: broker must be a table"):
        load("edge", ServerSettings, file, broker__port=1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_key_has_a_description_and_a_default(kind: type[msgspec.Struct]) -> None:
    """docs/settings.md is made of them, and a file names only what it changes."""
    schema = msgspec.json.schema(kind)["$defs"][kind.__name__]
    assert not schema.get("required")
    for key, value in schema["properties"].items():
        assert value.get("description", "").endswith("."), f"{kind.__name__}.{key} has no sentence"
    kind()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_defaults_pass_their_own_checks(kind: type[msgspec.Struct]) -> None:
    """Written to a file in full, the defaults load as they are."""
    assert msgspec.convert(msgspec.to_builtins(kind()), kind) == kind()


def test_settings_are_frozen() -> None:
    """Read once: nobody changes them on the way."""
    with pytest.raises(AttributeError):
        DeviceSettings().threads = 2  # type: ignore[misc]
