"""What the documents say is true: their code runs, their commands parse, their links and paths exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import typer

from kinflow import errors, manifest, settings
from kinflow.cli.app import app
from system_fixtures import running
from text_client import copy_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "devices").rglob("*.md"))
    if ".venv" not in path.parts
)
ROLES = {"device": settings.DeviceSettings, "edge": settings.ServerSettings, "cloud": settings.ServerSettings}
FORBIDDEN = {
    "a number of an issue": r"(?<![&\w])#\d+\b|\bissues? \d+",
    "a path of one machine": r"/work/|/root/|/home/\w",
    "advertising": r"(?i)\b(seamless|blazing|cutting.edge|revolutionary|effortless|powerful|state.of.the.art)",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, info: str) -> list[str]:
    """The page's fenced blocks of one kind."""
    return re.findall(rf"^```{info}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command line of the ```sh blocks: (page, words)."""
    for path in PAGES:
        for block in blocks(path, "sh"):
            for line in block.splitlines():
                if line and not line.startswith("#"):
                    yield name_of(path), shlex.split(line, comments=True)


def pages_with(info: str) -> list[Any]:
    return [pytest.param(path, id=name_of(path)) for path in PAGES if blocks(path, info)]


@pytest.mark.parametrize("path", pages_with("python"))
def test_python_blocks_run(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A page's Python, as one script in the checkout, ends well and says nothing on standard error."""
    environment = {**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:__main__"}
    script = "\n".join(blocks(path, "python"))
    if "kinflow_builder" in script:
        pytest.importorskip("torch", reason="pip install 'kinflow[builder]'")
    with ExitStack() as stack:
        folder = ROOT
        if "families/smollm2" in script:
            # Its weights are not in the repository: a small model stands for it.
            folder = tmp_path
            bundle = copy_tiny(request.getfixturevalue("tiny"), tmp_path / "families/smollm2/bundle", id="smollm2")
            serve = stack.enter_context(running("serve", str(bundle), "--mode", "local", "--port", "0", "--json"))
            script = script.replace("http://127.0.0.1:8080/v1", serve.ready()["url"])
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=folder,
            env=environment,
        )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_readme_example_prints_an_answer() -> None:
    """The README's lines print label, confidence, tier, degraded and reason of a real answer."""
    (script,) = blocks(ROOT / "README.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert re.fullmatch(r".+ [01]\.\d+ (device|edge|cloud) (True|False) .*\n", done.stdout), done.stdout


def parse(words: list[str]) -> None:
    """Parse a `kinflow …` line as the command would; nothing is run. Fails on an unknown command or flag."""
    command: Any = typer.main.get_command(app)
    context = None
    name = "kinflow"
    while True:
        context = command.make_context(name, list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, words = command.resolve_command(context, rest)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=f"{page}: {' '.join(words)}")
        for page, words in shell_lines()
        if Path(words[0]).name == "kinflow"
    ],
)
def test_kinflow_lines_parse(words: list[str]) -> None:
    """Each `kinflow` line of the documents names a command and flags that exist, with values that fit."""
    parse(words[1:])


def test_parse_refuses_what_is_not_there() -> None:
    """The check above can fail: unknown commands and flags are refused."""
    for words in (
        ["nonsense"],
        ["run", "photos/", "--nonsense"],
        ["bench", "nonsense"],
        ["edge", "--port", "many"],
    ):
        with pytest.raises(Exception, match=r"(?i)no such|valid"):
            parse(words)


def test_other_shell_lines_are_known() -> None:
    """`make` lines name targets of the Makefile, `pip install` lines extras of pyproject.toml."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^([\w-]+) = \[", project.split("\n[")[0], re.MULTILINE))
    seen = set()
    for page, words in shell_lines():
        program = Path(words[0]).name
        if program == "sudo":
            words, program = words[1:], words[1]
        seen.add(program)
        if program == "sh":
            script = ROOT / words[1]
            assert script.is_relative_to(ROOT / "devices"), page
            assert script.is_file(), f"{page}: {words[1]}"
            text = (ROOT / "devices/install.sh").read_text(encoding="utf-8")
            assert all(f"    {option})" in text for option in words[2:] if option.startswith("--")), f"{page}: {words}"
        elif program == "systemctl":
            assert words[2] == "kinflow-device", page
        elif program == "make":
            assert words[1] in targets, page
        elif program == "pip":
            assert words[1] in ("install", "uninstall"), page
            if words[2].startswith(".["):
                assert set(re.findall(r"[\w-]+", words[2])) <= extras, f"{page}: {words[2]}"
        else:
            assert program in ("kinflow", "python", "python3"), f"{page}: {words}"
    assert {"make", "pip", "kinflow", "sh"} <= seen
    for path in PAGES:
        for found in re.findall(r"pip install '\.\[([\w,-]+)\]'", path.read_text(encoding="utf-8")):
            assert set(found.split(",")) <= extras, f"{name_of(path)}: {found}"


@pytest.mark.parametrize("path", pages_with("toml"))
def test_toml_blocks_are_settings(path: Path, tmp_path: Path) -> None:
    """Each TOML block names its role in the first line, and its keys are that role's."""
    for block in blocks(path, "toml"):
        role = re.match(r"# kinflow-(\w+)\.toml\n", block)
        assert role, block
        file = tmp_path / "settings.toml"
        file.write_text(block, encoding="utf-8")
        settings.load(role[1], ROLES[role[1]], file)


def heading_anchors(path: Path) -> set[str]:
    """The anchors that a forge makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_resolve(path: Path) -> None:
    """Links and pictures lead to files of the repository, and to headings that are there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in heading_anchors(there), target


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_keep_to_the_subject(path: Path) -> None:
    """No page mentions trackers, one machine's paths, or advertises."""
    text = path.read_text(encoding="utf-8")
    for what, pattern in FORBIDDEN.items():
        found = re.search(pattern, text)
        assert found is None, f"{what}: {found and found[0]!r}"


def tree_paths() -> list[str]:
    """The paths in the README's tree, indented ones below the line they belong to."""
    (tree,) = blocks(ROOT / "README.md", "tree")
    paths = []
    parent = ""
    for line in tree.splitlines():
        name, phrase = re.fullmatch(r" *(\S+) +(\S.*)", line).groups()  # type: ignore[union-attr]
        assert phrase
        if line.startswith(" "):
            name = parent + name
        else:
            parent = name
        paths.append(name)
    return paths


def test_tree_names_only_what_exists() -> None:
    """Each line of the README's tree is a file or a folder of the repository."""
    for name in tree_paths():
        path = ROOT / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), name


def test_tree_names_every_folder_and_every_module() -> None:
    """No top-level folder, and no module of the SDK, is missing in the README's tree."""
    paths = tree_paths()
    made = {"__pycache__", "build", "dist"}
    for folder in ROOT.iterdir():
        if folder.is_dir() and folder.name[0] != "." and folder.name not in made:
            assert any(name.startswith(f"{folder.name}/") for name in paths), folder.name
    for module in (ROOT / "sdk/kinflow").iterdir():
        if module.suffix == ".py" and not module.name.startswith("__"):
            assert f"sdk/kinflow/{module.name}" in paths, module.name
        elif module.is_dir() and module.name not in made:
            assert f"sdk/kinflow/{module.name}/" in paths, module.name


def test_every_page_is_linked_from_the_readme() -> None:
    """A page of docs/ that the README does not lead to would not be found."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert f"({name_of(path)})" in text, path


def test_contributing_is_short() -> None:
    """CONTRIBUTING.md has under 30 lines."""
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 30


def test_errors_page_lists_every_error_and_code() -> None:
    """docs/errors.md has a row for each class of errors.py, with its code."""
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([\w-]+)` \|", text, re.MULTILINE))
    classes = {
        name: kind.code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.KinflowError) and kind is not errors.KinflowError
    }
    assert rows == classes


@pytest.mark.parametrize(
    "kind",
    [
        manifest.Manifest,
        manifest.Preprocess,
        manifest.Split,
        manifest.Codec,
        manifest.Segment,
        manifest.Graph,
        manifest.File,
        manifest.Tensor,
        manifest.Exit,
        manifest.Certificate,
        manifest.Member,
    ],
    ids=lambda kind: kind.__name__,
)
def test_families_page_names_every_field(kind: type[Any]) -> None:
    """docs/families.md names every field that may stand in family.json."""
    text = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    for name in kind.__struct_fields__:
        assert f"`{name}`" in text, name


def test_benchmarks_page_has_every_command() -> None:
    """docs/benchmarks.md has a section for each `kinflow bench` command."""
    from kinflow_bench.cli import app as bench

    names = {command.name or command.callback.__name__ for command in bench.registered_commands if command.callback}
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == names


def test_demo_picture_can_be_made_again(tmp_path: Path) -> None:
    """The script draws what a real demo shows: rows, the summary, and the rows' tiers."""
    out = tmp_path / "demo.svg"
    command = [sys.executable, str(ROOT / "docs/make_demo_picture.py"), "--images", "60", "--out", str(out)]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    for picture in (out, ROOT / "docs/images/demo.svg"):
        text = picture.read_text(encoding="utf-8")
        assert text.startswith("<svg")
        for word in ("device", "edge", "cloud", "accuracy", "bytes&#160;up"):
            assert word in text, f"{picture}: {word}"
        assert "@font-face" not in text
