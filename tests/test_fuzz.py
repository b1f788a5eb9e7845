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


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")
@each_target
def test_a_short_run_of_the_fuzzer(name: str) -> None:
    """The command of CONTRIBUTING.md, shortened: it runs what it was told, and finds nothing."""
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), name, "-runs=3000"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{name}: 3000 executions" in done.stdout


def test_the_fuzzer_can_find_something() -> None:
    """A target that fails on some input is reported with status 1: the run above can fail."""
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import run
sys.exit(run.main(["no-such-target"]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(HERE)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
