"""Whether every picture of a folder can be decoded, asked before a build spends its time on training. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kinflow.errors import InputError
from kinflow.images import MAX_PIXELS, read_image
from kinflow.manifest import Preprocess
from kinflow_builder.folders import Pictures

# A JPEG is decoded at an eighth of its size where it may be: all of the file is read, most of the work is not done.
PLANE = Preprocess(mode="RGB", height=16, width=16, mean=[0.0] * 3, std=[1.0] * 3, resize="stretch")
SHOWN = 10


def check(parts: Iterable[Pictures], threads: int = 2) -> None:
    """Raises InputError that names every picture which cannot be read, so that one look at the folder mends it."""
    files = [item for part in parts for item in part.items if isinstance(item, Path)]
    with ThreadPoolExecutor(threads) as pool:
        found = [problem for problem in pool.map(_problem, files) if problem is not None]
    if len(found) == 1:
        raise InputError(f"{found[0]}: replace it or take it away")
    if found:
        shown = "".join(f"\n  {problem}" for problem in found[:SHOWN])
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        way_out = "replace them or take them away"
        raise InputError(f"{len(found)} of {len(files)} pictures cannot be read: {way_out}{shown}{more}")


def overlooked(directory: Path, parts: Iterable[Pictures]) -> list[str]:
    """A line for each kind of file that lies among the pictures and is none, and for each folder without a picture."""
    files = {item for part in parts for item in part.items if isinstance(item, Path)}
    if not files:
        return []  # an idx pair
    folders = {folder for file in files for folder in file.parents}
    others = [path for path in sorted(directory.rglob("*")) if path not in files and not _hidden(path, directory)]
    kinds = Counter(path.suffix.lower() or path.name for path in others if path.is_file())
    return [
        *(f"{path} holds no picture: it is no class" for path in others if path.is_dir() and path not in folders),
        *(f"left out: {kind}, which is no kind of picture that is read ({count})" for kind, count in kinds.items()),
    ]


def _hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


def _problem(file: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.width * image.height <= MAX_PIXELS:
                image.draft("RGB", (PLANE.width, PLANE.height))
                image.load()
                return None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        pass  # read_image says it in our words, or reads it after all
    try:
        read_image(file, PLANE)
    except InputError as exc:
        return str(exc)
    return None
