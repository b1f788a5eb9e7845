"""`python tests/fuzz/run.py [TARGET …] [-runs=N]`: atheris over the parsers; all targets and 1,250,000 runs without.

Needs `pip install atheris`. Each target runs in a process of its own, with a limit for memory and time; the parsers are
instrumented once and the processes are forked. What makes one fail is written to tests/fuzz/found/ and is a test from
then on.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris

# The fuzzer must see the parsers' branches.
with atheris.instrument_imports(include=["kinflow", "kinflow_edge"]):
    import seeds
    import targets

RUNS = 1_250_000
FOUND = Path(__file__).with_name("found")
LIMITS = ["-timeout=60", "-rss_limit_mb=1024", "-max_len=4096", "-print_final_stats=1"]

Target = Callable[[bytes], object]


def fuzz(name: str, target: Target, examples: Sequence[bytes], runs: str, found: Path = FOUND) -> bool:
    """Fuzz one target, beginning at `examples`; whether nothing was found."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kinflow-fuzz-") as corpus, tempfile.TemporaryFile() as output:
        for number, example in enumerate(examples):
            (Path(corpus) / str(number)).write_bytes(example)
        status = _in_a_child(target, [corpus, f"-artifact_prefix={found}/{name}-", runs, *LIMITS], output.fileno())
        output.seek(0)
        said = output.read().decode(errors="replace")
    counted = re.search(r"stat::number_of_executed_units: (\d+)", said)
    memory = re.search(r"stat::peak_rss_mb: +(\d+)", said)
    executed, peak_mb = (int(found[1]) if found else 0 for found in (counted, memory))
    spent_s = time.monotonic() - start_s
    good = status == 0 and executed > 0
    verdict = "nothing found" if good else f"FAILED: {said.strip()[-2000:]}"
    print(f"{name}: {executed} executions, {executed / spent_s:.0f}/s, peak {peak_mb} MB, {verdict}", flush=True)
    return good


def _in_a_child(target: Target, options: list[str], output: int) -> int:
    """The exit status of a process that fuzzes: atheris ends it, and does not return."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            atheris.Setup([sys.argv[0], *options], target)
            atheris.Fuzz()
        finally:
            # The C library's: libFuzzer keeps the input then. What Python would tidy up is the parent's.
            ctypes.CDLL(None).exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(arguments: list[str]) -> int:
    runs = next((argument for argument in arguments if argument.startswith("-runs=")), f"-runs={RUNS}")
    names = [argument for argument in arguments if not argument.startswith("-")] or list(targets.TARGETS)
    FOUND.mkdir(exist_ok=True)
    # Every target runs, also after one has failed.
    failed = [name for name in names if not fuzz(name, targets.TARGETS[name], seeds.seeds(name), runs)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
