"""`python tests/fuzz/run.py [TARGET …] [-runs=N]`: atheris over the parsers; all targets and 1,250,000 runs without.

Needs `pip install atheris`. Each target runs in a process of its own, with a limit for memory and time. What makes
one fail is written to tests/fuzz/found/ and is a test from then on.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 1_250_000
FOUND = Path(__file__).with_name("found")
LIMITS = ["-timeout=60", "-rss_limit_mb=1024", "-max_len=4096", "-print_final_stats=1"]


def fuzz_one(name: str, options: list[str]) -> None:
    """In the process of one target; atheris does not return."""
    import atheris

    # Imported only now, so that the fuzzer sees the parsers' branches.
    with atheris.instrument_imports(include=["kinflow", "kinflow_edge"]):
        import targets
    atheris.Setup([sys.argv[0], *options], targets.TARGETS[name])
    atheris.Fuzz()


def run(name: str, runs: str) -> bool:
    """Fuzz one target; whether nothing was found."""
    import seeds

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kinflow-fuzz-") as corpus:
        for number, seed in enumerate(seeds.seeds(name)):
            (Path(corpus) / str(number)).write_bytes(seed)
        command = [sys.executable, __file__, "--inside", name, corpus, f"-artifact_prefix={FOUND}/{name}-", runs]
        done = subprocess.run([*command, *LIMITS], capture_output=True, text=True, check=False)
    said = done.stderr
    counted = re.search(r"stat::number_of_executed_units: (\d+)", said)
    memory = re.search(r"stat::peak_rss_mb: +(\d+)", said)
    executed, peak_mb = (int(found[1]) if found else 0 for found in (counted, memory))
    spent_s = time.monotonic() - start
    verdict = "nothing found" if done.returncode == 0 and executed else f"FAILED: {said.strip()[-2000:]}"
    print(f"{name}: {executed} executions, {executed / spent_s:.0f}/s, peak {peak_mb} MB, {verdict}", flush=True)
    return done.returncode == 0 and executed > 0


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--inside"]:
        fuzz_one(arguments[1], arguments[2:])
        return 0
    import targets

    runs = next((argument for argument in arguments if argument.startswith("-runs=")), f"-runs={RUNS}")
    names = [argument for argument in arguments if not argument.startswith("-")] or list(targets.TARGETS)
    FOUND.mkdir(exist_ok=True)
    # Every target runs, also after one has failed.
    failed = [name for name in names if not run(name, runs)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
