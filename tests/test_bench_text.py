"""`kinflow bench generate`: what is kept, compared, counted and drawn, and a short run of all of it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brokers import wait_until
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from kinflow.text.family import TextFamily
from kinflow.text.summary import Summary
from kinflow_bench import breakeven
from kinflow_bench.breakeven import Measured, Speeds
from kinflow_bench.confident import confident
from kinflow_bench.generate import costs
from kinflow_bench.identity import Bench, References, first_difference, generate, p_value
from kinflow_bench.progress import progress
from kinflow_bench.shelf import Shelf
from kinflow_bench.throttle import Throttle
from kinflow_builder.text.tiny import write_tiny

SHORT = "--prompts 2 --tokens 8 --timed 1 --sampled 1 --samples 20 --round-trip 5 --json"
SPEEDS = Speeds(0.015, 0.005, 0.02, 0.04)


def test_shelf_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """What was found is not looked for again by the next run; half a line is what a kill leaves."""
    path = tmp_path / "state.jsonl"
    assert Shelf(path).get(["a", 1], lambda: [3]) == [3]
    path.write_text(path.read_text() + '{"key": "b", "va')
    again = Shelf(path)
    assert again.get(["a", 1], lambda: pytest.fail("it was there")) == [3]
    assert again.get(["a", 2], lambda: {"x": None}) == {"x": None}
    assert Shelf(path).get(["a", 2], lambda: pytest.fail("it was there")) == {"x": None}


def test_first_difference() -> None:
    """Texts may end by a stop token that is not shown; one that is shorter parts at its end."""
    assert first_difference([1, 2], [1, 2, 0], [0]) is None
    assert first_difference([1, 3], [1, 2, 0], [0]) == 1
    assert first_difference([1], [1, 2], [0]) == 1


def test_p_value_tells_distributions_apart() -> None:
    """Samples of the distribution itself pass, those of a similar one do not."""
    random, weights = np.random.default_rng(0), np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    drawn = random.choice(5, 1000, p=weights)
    assert p_value(drawn.tolist(), weights, []) > 0.01
    assert p_value(drawn.tolist(), weights[[1, 0, 2, 3, 4]], []) < 0.01
    ended = np.where(drawn == 0, -1, drawn)  # token 0 stops: the text is empty
    assert p_value(ended.tolist(), weights, [0]) > 0.01


def test_break_even_is_where_both_take_as_long(tmp_path: Path) -> None:
    """At the acceptance needed, drafting takes what the server alone takes; the plot is a picture."""
    for round_trip_s, share in ((0.005, 1.0), (0.08, 0.25)):
        acceptance = breakeven.needed(SPEEDS, round_trip_s, share)
        alone_s = SPEEDS.whole_s / share
        assert breakeven.drafted_s(SPEEDS, acceptance, round_trip_s, share) == pytest.approx(alone_s)
    path = tmp_path / "images" / "plot.png"
    breakeven.plot(path, SPEEDS, {"equal": 1.0}, [Measured(0.02, 1.0, 0.6, 1.2), Measured(0.08, 1.0, 0.6, 0.8)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_costs_tell_refused_drafts_from_superseded_ones() -> None:
    """Of ten drafts five stood and one fell; four came after it, which nobody decided."""
    found = costs([Summary("family", 4, {"device": 5, "edge": 0, "cloud": 3}, drafted=10, accepted=5, refused=1)], 30)
    assert found["acceptance"] == 0.5
    assert found["acceptance_decided"] == 5 / 6


def test_disagreement_is_of_tokens_that_left_early(tmp_path: Path) -> None:
    """A device that is sure of everything: all its tokens leave, and those count that the largest would not say."""
    write_tiny(tmp_path)
    manifest = json.loads((tmp_path / "family.json").read_text())
    manifest["exits"]["device"]["certificate"]["threshold"] = 0.0
    (tmp_path / "family.json").write_text(json.dumps(manifest))
    references = References(TextFamily.load(tmp_path))
    asked = [[5, 6, 7], [100, 101]]
    with TextDevice.open(tmp_path, DeviceSettings(offload=False)) as device:
        said = {tuple(prompt): [token.id for token in generate(device, prompt, 16, "confident")[0]] for prompt in asked}
        with progress("texts", 2, quiet=True) as steps:
            figures, summaries = confident(Bench(device, references, Shelf(None), 1, steps), asked, 16)
    largest = references.by_mode["exact"]
    texts = [(list(prompt), text) for prompt, text in said.items()]
    theirs = [int(largest.logits([*prompt, *text[:at]]).argmax()) for prompt, text in texts for at in range(len(text))]
    mine = [token for _, text in texts for token in text]
    wrong = sum(ours != other for ours, other in zip(mine, theirs, strict=True))
    assert 0 < wrong < len(mine)
    assert figures["unverified_share"] == 1
    assert figures["disagreement"] == wrong / len(mine)
    assert figures["certified"]["epsilon"] == 0.05
    assert [summary.verifications for summary in summaries] == [0, 0]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_for_terminals(tmp_path: Path, terminal: bool) -> None:
    """With --json the whole benchmark says nothing on a pipe, on a terminal how far it is; texts are as promised."""
    bundle = tmp_path / "bundle"
    write_tiny(bundle)
    command = [sys.executable, "-m", "kinflow", "bench", "generate", str(bundle), *SHORT.split()]
    ours, theirs = pty.openpty() if terminal else os.pipe()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = b"".join(iter(lambda: _read(ours), b"")).decode()
        figures = json.loads(process.communicate()[0])
    os.close(ours)
    assert process.returncode == 0
    assert (figures["identical"], figures["identical_family"]) == (2, 2)
    assert figures["layer_tokens_ratio"] > 0
    early = figures["confident"]
    assert 0 <= early["disagreement"] <= early["unverified_share"] <= 1
    assert figures["links"]["5 ms"]["cloud_only_over_confident"] > 0
    if terminal:
        # 2 texts compared and 2 `confident`, 20 samples in each mode, one timed text at full and at a quarter of speed
        assert "46/46" in shown
    else:
        assert shown == ""


def _read(descriptor: int) -> bytes:
    """Nothing at the end; a terminal's end is an error."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def test_nobody_stays_stopped() -> None:
    """A throttled process goes on when its throttle ends, also by the death of the benchmark."""
    script = """
import os, sys, time
from kinflow_bench.throttle import Throttle
with Throttle(int(sys.argv[1]), 0.01):
    print("stopping", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(["sleep", "60"]) as throttled:
        try:
            with Throttle(throttled.pid, 0.01):
                wait_until(lambda: _state(throttled.pid) == "T")
            assert _state(throttled.pid) == "S"
            command = [sys.executable, "-c", script, str(throttled.pid)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as benchmark:
                assert benchmark.stdout is not None
                assert benchmark.stdout.readline()
                wait_until(lambda: _state(throttled.pid) == "T")
                benchmark.kill()
            throttled.terminate()
            throttled.wait(10)
        finally:
            throttled.kill()


def _state(pid: int) -> str:
    """One letter: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
