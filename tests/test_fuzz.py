"""No parser is stopped by any bytes: hypothesis, everything that fuzzing has found, and a short run of the fuzzer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).with_name("fuzz")))
import seeds
import targets

HERE = Path(__file__).with_name("fuzz")
FOUND = sorted(path for path in (HERE / "found").iterdir() if path.name != "README.md")
each_target = pytest.mark.parametrize("name", targets.TARGETS)


@each_target
@given(data=st.data())
def test_any_bytes_are_parsed_or_refused(name: str, data: st.DataObject) -> None:
    """Whatever comes, only the parser's own error leaves it, and what it accepts it can write again."""
    targets.TARGETS[name](data.draw(st.binary(max_size=2000)))


@each_target
@given(data=st.data())
def test_damaged_messages_are_parsed_or_refused(name: str, data: st.DataObject) -> None:
    """The same for valid input with a few bytes changed, cut out or put in: it gets deeper."""
    good = bytearray(data.draw(st.sampled_from(seeds.seeds(name))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(good) - 1)))
        good[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    targets.TARGETS[name](bytes(good))


@each_target
def test_seeds_are_accepted(name: str) -> None:
    """The fuzzer begins at valid input: a seed that is refused would be no beginning."""
    for seed in seeds.seeds(name):
        targets.TARGETS[name](seed)


NUMBERS = st.integers() | st.floats() | st.sampled_from([1 << 40, 1e38, 1e-300])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(inside: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a JSON document, by what holds it and its key or index there."""
    for key in list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ():
        yield inside, key
        yield from places(inside[key])


@pytest.mark.parametrize("name", ["manifests", "text_manifests"])
@given(data=st.data())
def test_a_manifest_with_any_value_anywhere_is_refused_or_checked(name: str, data: st.DataObject) -> None:
    """Any JSON in place of any value of a real manifest: BundleError, or a manifest whose references hold."""
    manifest = json.loads(seeds.seeds(name)[0])
    holder, key = data.draw(st.sampled_from(list(places(manifest))))
    holder[key] = data.draw(JSON)
    targets.TARGETS[name](json.dumps(manifest).encode())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_was_found_once_stays_repaired(path: Path) -> None:
    """Each input that a fuzzer found runs against its target, which stands first in its name."""
    targets.TARGETS[path.name.partition("-")[0]](path.read_bytes())


needs_atheris = pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")

# A length byte that is believed: what the fuzzer is for.
PLANTED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import run

@run.atheris.instrument_func
def faulty(data):
    if data[:2] == b"kf" and data[2] > 3:
        data[data[2] + 4]

sys.exit(not run.fuzz("planted", faulty, [b"kf\x03abcdefgh"], "-runs=200000", Path(sys.argv[2])))
"""


@needs_atheris
def test_a_short_run_of_the_fuzzer() -> None:
    """The command of CONTRIBUTING.md, shortened: every parser runs as often as told, and nothing is found."""
    command = [sys.executable, str(HERE / "run.py"), "-runs=3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for name in targets.TARGETS:
        assert f"{name}: 3000 executions" in done.stdout


@needs_atheris
def test_the_fuzzer_finds_a_bug_that_was_put_in(tmp_path: Path) -> None:
    """A parser that believes a length: the status is 1, and the input that shows it is kept and shows it again."""
    command = [sys.executable, "-c", PLANTED, str(HERE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert "IndexError" in done.stdout
    (kept,) = tmp_path.glob("planted-crash-*")
    data = kept.read_bytes()
    assert data[:2] == b"kf"
    assert len(data) < 3 or len(data) <= data[2] + 4
