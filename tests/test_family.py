"""Bundles: a good one loads from a folder and a zip, a damaged one is refused; members compute what their graphs do."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from kinflow.bundle import MANIFEST
from kinflow.errors import BackendError, BundleError, FamilyMismatch
from kinflow.family import INPUT, Family
from spoiled import GRAPH, ONNX0, Document, edit, put, refused


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """The small bundle, to be spoiled."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def zipped(folder: Path, to: Path, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(to, "w", compression) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return to


def test_a_bundle_loads_from_a_folder_and_from_a_zip(bundle: Path, tmp_path: Path) -> None:
    """Both hold the same manifest, files and codecs, and every file was read."""
    family = Family.load(str(bundle))
    assert (family.id, family.version, len(family.labels)) == ("synthetic", "1.0.0", 10)
    assert set(family.files) == {file.path for file in family.manifest.files()}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        other = Family.load(zipped(bundle, tmp_path / f"{compression}.zip", compression))
        assert other.manifest == family.manifest
        assert other.files == family.files
        assert other.codecs.keys() == family.codecs.keys()


def test_the_committed_bundle_loads(fashion: Path) -> None:
    """The family that the demo and a device use is whole, small, and has all three members on both backends."""
    family = Family.load(fashion)
    assert set(family.manifest.members) >= {"device", "edge", "cloud"}
    assert len(family.labels) == 10
    assert sum(file.stat().st_size for file in fashion.iterdir()) <= 4 * 1024 * 1024
    first = family.manifest.segments[family.manifest.members["device"].segments[0]]
    assert set(first.graphs) == {"onnx", "tflite"}


# The files


def test_every_flipped_byte_is_noticed(copy: Path) -> None:
    """Whichever file is damaged, its name and both digests are told."""
    for file in Family.load(copy).manifest.files():
        data = bytearray((copy / file.path).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / file.path).write_bytes(data)
        assert f"{file.path} has sha256" in refused(copy)
        data[len(data) // 2] ^= 1
        (copy / file.path).write_bytes(data)
    Family.load(copy)


def test_a_missing_file_is_named(copy: Path, tmp_path: Path) -> None:
    """In a folder and in a zip."""
    (copy / GRAPH).unlink()
    assert GRAPH in refused(copy)
    assert GRAPH in refused(zipped(copy, tmp_path / "b.zip"))


def test_a_file_longer_or_shorter_than_announced_is_refused(copy: Path, tmp_path: Path) -> None:
    """Too long is refused before it is read, too short by its digest."""
    good = (copy / GRAPH).read_bytes()
    (copy / GRAPH).write_bytes(good + b"\0")
    assert f"has {len(good) + 1} bytes, at most {len(good)}" in refused(copy)
    assert f"more than the {len(good)} bytes" in refused(zipped(copy, tmp_path / "b.zip"))
    (copy / GRAPH).write_bytes(good[:-1])
    assert "sha256" in refused(copy)


def graph_path(path: str) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        document["segments"]["trunk0"]["graphs"]["onnx"]["file"]["path"] = path

    return change


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/hostname", "..", "a\\..\\secret", "C:\\x"])
def test_a_path_may_not_leave_the_folder(copy: Path, tmp_path: Path, path: str) -> None:
    """Not by dots, not from the root, not the Windows way; whether or not there is such a file."""
    shutil.copy(copy / GRAPH, tmp_path / "secret")
    edit(copy, graph_path(path))
    assert "is outside the bundle" in refused(copy)
    assert "is outside the bundle" in refused(zipped(copy, tmp_path / "b.zip"))


def test_a_link_may_not_leave_the_folder(copy: Path, tmp_path: Path) -> None:
    """Even to a file with the right content."""
    shutil.move(copy / GRAPH, tmp_path / "elsewhere")
    (copy / GRAPH).symlink_to(tmp_path / "elsewhere")
    assert "is outside the bundle" in refused(copy)


def test_a_link_within_the_folder_is_fine(copy: Path) -> None:
    """A folder itself may be reached by a link as well."""
    (copy / GRAPH).rename(copy / "renamed")
    (copy / GRAPH).symlink_to("renamed")
    (copy.parent / "link").symlink_to(copy)
    assert Family.load(copy.parent / "link").files[GRAPH] == (copy / "renamed").read_bytes()


@pytest.mark.parametrize(
    ("path", "said"),
    [("a\0b", "embedded null"), ("é" * 200, "too long"), (".", "not a regular file"), ("loop", "loop")],
)
def test_a_path_that_the_system_refuses_is_a_bundle_error(copy: Path, path: str, said: str) -> None:
    """NUL, a name too long, a folder, a link to itself."""
    (copy / "loop").symlink_to("loop")
    assert said.lower() in refused(edit(copy, graph_path(path))).lower()


def test_a_pipe_is_not_waited_for(copy: Path, tmp_path: Path) -> None:
    """Neither as a file, nor as the manifest, nor as the bundle."""
    os.mkfifo(copy / "pipe")
    assert "not a regular file" in refused(edit(copy, graph_path("pipe")))
    (copy / MANIFEST).unlink()
    os.mkfifo(copy / MANIFEST)
    assert "not a regular file" in refused(copy)
    os.mkfifo(tmp_path / "pipe")
    assert "give the folder or the .zip" in refused(tmp_path / "pipe")


@pytest.mark.parametrize("path", ["nothing/here", "x" * 5000, "a\0b"])
def test_a_bundle_that_does_not_exist(path: str) -> None:
    """The path is named, and what to give instead."""
    assert "give the folder or the .zip of a bundle" in refused(Path(path))


def test_a_folder_or_file_that_is_no_bundle(tmp_path: Path) -> None:
    """An empty folder, a text file, an empty zip."""
    assert MANIFEST in refused(tmp_path)
    (tmp_path / "text").write_text("hello")
    assert "neither the folder of a bundle nor a .zip" in refused(tmp_path / "text")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    assert f"cannot read '{MANIFEST}'" in refused(tmp_path / "empty.zip")


def test_a_damaged_zip_is_refused_or_unharmed(bundle: Path, tmp_path: Path) -> None:
    """Bytes changed anywhere in it: BundleError, or the very same contents."""
    good = Family.load(bundle)
    path = zipped(bundle, tmp_path / "b.zip")
    data = path.read_bytes()
    rng = random.Random(0)
    refusals = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about names that occur twice
        for _ in range(1500):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(damaged[: rng.randrange(len(data))] if rng.random() < 0.1 else damaged)
            try:
                assert Family.load(path).files == good.files
            except BundleError:
                refusals += 1
    assert refusals > 1000


# Members


def test_a_member_computes_what_onnxruntime_computes(family: Family) -> None:
    """Features and logits are the graphs' own, bit for bit."""
    batch = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    output = family.member("device").run(batch)
    session = onnxruntime.InferenceSession(family.files[GRAPH], providers=["CPUExecutionProvider"])
    features, logits = session.run(None, {"x": batch})
    assert (output.split, output.exit) == ("s1", "device")
    assert output.features is not None
    assert np.array_equal(output.features, features)
    assert np.array_equal(output.logits, logits)


def test_a_member_from_a_split_equals_the_whole(family: Family) -> None:
    """Continuing from the features gives what running from the input gives."""
    batch = np.random.default_rng(1).random((4, 1, 8, 8), np.float32)
    whole = family.member("cloud").run(batch)
    features = family.member("device").run(batch).features
    assert features is not None
    rest = family.member("cloud", source="s1")
    assert [segment.name for segment in rest.segments] == ["trunk1"]
    continued = rest.run(features)
    assert np.array_equal(continued.logits, whole.logits)
    assert continued.features is None
    assert continued.split is None
    assert continued.exit == whole.exit == "cloud"


def test_the_committed_members_continue_from_each_split(fashion: Path) -> None:
    """For the real family too, a member from a split equals the whole."""
    family = Family.load(fashion)
    spec = family.preprocess
    batch = np.random.default_rng(2).normal(size=(2, len(spec.mean), spec.height, spec.width)).astype(np.float32)
    for name, member in family.manifest.members.items():
        whole = family.member(name)
        expected = whole.run(batch)
        features = batch
        for segment in member.segments:
            source = family.manifest.segments[segment].source
            if source != INPUT:
                rest = family.member(name, source=source).run(features)
                np.testing.assert_allclose(rest.logits, expected.logits, atol=1e-5)
            opened = next(part for part in whole.segments if part.name == segment)
            features = opened.runner.run(features)[0]


def test_unknown_names_are_told_with_the_known_ones(family: Family) -> None:
    """A member, source, backend, split or codec that the family does not have is a FamilyMismatch."""
    with pytest.raises(FamilyMismatch, match="has the members 'device', 'edge', 'cloud', asked for 'x'"):
        family.member("x")
    with pytest.raises(FamilyMismatch, match="'device' of synthetic can begin at 'input', asked for 's1'"):
        family.member("device", source="s1")
    with pytest.raises(FamilyMismatch, match="has graphs for 'onnx', asked for 'tflite'"):
        family.member("device", backend="tflite")
    with pytest.raises(FamilyMismatch, match="has the splits 's1', asked for 's2'"):
        family.codec("s2")
    with pytest.raises(FamilyMismatch, match="has the codecs 'q8', got 'q4'"):
        family.codec("s1", "q4")
    assert family.codec("s1") is family.codec("s1", "q8")


def test_a_verified_file_that_is_no_graph_is_a_backend_error(copy: Path) -> None:
    """The digest says that it is the file that was meant, the runtime that it is no graph."""
    (copy / GRAPH).write_bytes(b"no graph")
    edit(copy, put(*ONNX0, "file", "sha256", value=hashlib.sha256(b"no graph").hexdigest()))
    family = Family.load(copy)
    with pytest.raises(BackendError, match=f"{GRAPH}: ONNX Runtime .* refuses it"):
        family.member("device")


def test_a_changed_file_is_not_looked_at_again(copy: Path) -> None:
    """Graphs are opened from the verified bytes: a file may change or go after loading."""
    family = Family.load(copy)
    (copy / GRAPH).unlink()
    assert family.member("device").run(np.zeros((1, 1, 8, 8), np.float32)).exit == "device"
