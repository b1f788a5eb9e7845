"""The command `kinflow`: one file per command. Needs the extra `cli`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line; ends the process."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"error: the command line needs {' and '.join(missing)}: pip install 'kinflow[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        from kinflow.cli.app import app

        app(prog_name="kinflow")
    except KeyboardInterrupt:  # while modules were still being loaded
        sys.exit(130)
