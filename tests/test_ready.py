"""A struct is ready before several threads are first to use it."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

# Threads switch as often as can be, and all begin at once.
SCRIPT = """
import sys, threading
sys.setswitchinterval(1e-6)
import msgspec
from kinflow.manifest import Manifest
raw = open(sys.argv[1], "rb").read()
barrier = threading.Barrier(6)

def decode():
    barrier.wait()
    msgspec.json.decode(raw, type=Manifest)

threads = [threading.Thread(target=decode) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
# Without `ready` about one in five dies of a segmentation fault.
TIMES = 16


def test_many_threads_may_be_the_first_to_decode_a_manifest() -> None:
    """As when an app opens its devices in threads of their own."""
    bundle = ROOT / "families/fashion/bundle/family.json"
    for _ in range(TIMES):
        command = [sys.executable, "-c", SCRIPT, str(bundle)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
