"""Folders of pictures: each layout, how classes are matched, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pip install 'kinflow[cli]'")
from PIL import Image

from kinflow import idx
from kinflow.errors import InputError
from kinflow.manifest import Preprocess
from kinflow_builder import folders

GREY = Preprocess("L", 8, 6, [0.5], [0.5], "stretch")
TENCH = "007_n01440764_tench.png"
COLOUR = Preprocess("RGB", 8, 6, [0.5] * 3, [0.5] * 3, "crop")


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), (shade, shade, shade)).save(path)
    return path


def by_class(root: Path, counts: dict[str, int]) -> Path:
    """Class folders; every picture has a shade of its own."""
    shade = 0
    for name, count in counts.items():
        for number in range(count):
            picture(root / name / f"{number}.png", shade)
            shade += 1
    return root


def test_class_folders_by_name(tmp_path: Path) -> None:
    """Case, blanks and signs do not matter, and one part of a label with several names is enough."""
    root = by_class(tmp_path, {"t_shirt_top": 1, "TENCH": 2, "white-shark": 1})
    found = folders.find(root, ["tench, Tinca tinca", "white shark", "T-shirt/top", "never there"])
    assert found.labels is not None
    names = [item.parent.name for item in found.items]
    assert dict(zip(names, found.labels.tolist(), strict=True)) == {"TENCH": 0, "t_shirt_top": 2, "white-shark": 1}
    assert len(found) == 4


def test_class_folders_by_index(tmp_path: Path) -> None:
    """Where names are ambiguous, the index before them decides."""
    root = by_class(tmp_path, {"1_crane": 1, "2_crane": 2})
    found = folders.find(root, ["tench", "crane", "crane"])
    assert found.labels is not None
    assert found.labels.tolist() == [1, 2, 2]


def test_own_classes_are_sorted(tmp_path: Path) -> None:
    """Without a family the folders' sorted names are the classes."""
    found = folders.find(by_class(tmp_path, {"b": 1, "a": 2}))
    assert found.classes == ["a", "b"]
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1]


def test_flat_files(tmp_path: Path) -> None:
    """The index before the name is the label; hidden files are passed over."""
    for name in (TENCH, "0.png", "2-x.png", "._0.png", ".notes"):
        picture(tmp_path / name, 1) if name.endswith("png") else (tmp_path / name).write_text("x")
    found = folders.find(tmp_path, [str(n) for n in range(8)])
    assert found.labels is not None
    names = [item.name for item in found.items]
    assert dict(zip(names, found.labels.tolist(), strict=True)) == {TENCH: 7, "0.png": 0, "2-x.png": 2}
    own = folders.find(tmp_path)
    assert own.classes == ["0", "2", "7"]
    assert own.labels is not None
    assert sorted(own.labels.tolist()) == [0, 1, 2]
    assert own.labels[names.index(TENCH)] == 2


def test_parts(tmp_path: Path) -> None:
    """train/ and test/ are told apart; where only the other one is there, the error says so."""
    by_class(tmp_path / "train", {"a": 3, "b": 3})
    by_class(tmp_path / "test", {"a": 1, "b": 1})
    assert len(folders.find(tmp_path, part="train")) == 6
    assert len(folders.find(tmp_path)) == 2
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="has train/, expected test or val/ too"):
        folders.find(tmp_path)


def test_idx_pairs(tmp_path: Path) -> None:
    """The pair of the part; a pair that is alone serves as any part."""
    for prefix, count in (("train-", 4), ("t10k-", 2)):
        idx.write(tmp_path / f"{prefix}images-idx3-ubyte.gz", np.full((count, 8, 6), count, np.uint8))
        idx.write(tmp_path / f"{prefix}labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    found = folders.find(tmp_path, part="train")
    assert found.classes == ["0", "1", "2", "3"]
    (test,) = folders.find(tmp_path, found.classes).batches(GREY)
    assert test.shape == (2, 1, 8, 6)
    for path in tmp_path.glob("train-*"):
        path.unlink()
    assert len(folders.find(tmp_path, part="train")) == 2
    with pytest.raises(InputError, match=r"holds images of \(8, 6\), this family takes \(8, 6, 3\)"):
        next(folders.find(tmp_path).read(COLOUR))
    with pytest.raises(InputError, match="has the label 1, the family's are 0 to 0"):
        folders.find(tmp_path, ["only"])
    next(tmp_path.glob("*labels*")).unlink()
    assert folders.find(tmp_path, labelled=False).labels is None
    with pytest.raises(InputError, match="has no labels beside it"):
        folders.find(tmp_path)


def test_pictures_come_as_the_family_takes_them(tmp_path: Path) -> None:
    """Images have the family's size and mode; batches are preprocessed and no larger than asked for."""
    found = folders.find(by_class(tmp_path, {"a": 3, "b": 2}))
    images = list(found.read(COLOUR))
    assert all(image.shape == (8, 6, 3) and image.dtype == np.uint8 for image, _ in images)
    assert [label for _, label in images] == [0, 0, 0, 1, 1]
    batches = list(found.batches(GREY, 2))
    assert [batch.shape for batch in batches] == [(2, 1, 8, 6), (2, 1, 8, 6), (1, 1, 8, 6)]
    assert batches[2][0, 0, 0, 0] == pytest.approx((4 / 255 - 0.5) / 0.5)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """A broken picture is an error, which names it, only when its turn comes."""
    root = by_class(tmp_path, {"a": 2})
    (root / "a" / "1.png").write_bytes(b"not a picture")
    reading = folders.find(root).read(GREY)
    next(reading)
    with pytest.raises(InputError, match=r"1\.png is not an image"):
        next(reading)


def test_a_few_of_all(tmp_path: Path) -> None:
    """Evenly over the classes and not one after the other, so that the first of the few are of every class, too."""
    found = folders.find(by_class(tmp_path, {"a": 20, "b": 20, "c": 20}))
    few = found.spread(30)
    assert np.bincount(few.truth).tolist() == [10, 10, 10]
    assert set(few.truth[:10]) == {0, 1, 2}
    assert sorted(map(str, found.spread(100).items)) == sorted(map(str, found.items))


def test_unlabelled(tmp_path: Path) -> None:
    """Any pictures do, in sub-folders too, where no labels are wanted."""
    picture(tmp_path / "holiday.png", 1)
    picture(tmp_path / "deep" / "er" / "beach.png", 2)
    found = folders.find(tmp_path, ["a"], labelled=False)
    assert (len(found), found.labels) == (2, None)
    assert [label for _, label in found.read(GREY)] == [None, None]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no picture"),
        (["photo.png"], r"photo\.png: expected a name that begins with the class's index"),
        (["9_x.png"], "begins with the index 9, the family's labels are 0 to 1"),
        (["a/1.png", "0_x.png"], "expected a folder per class, or flat files, not both"),
        (["a/1.png", "z/1.png"], r"1 of 2 folders fit none of the labels, or several: 'z'; expected .*'a', 'b'"),
        (["a/1.png", "A/1.png"], "more than one folder is of the same label: 'A', 'a'"),
    ],
)
def test_refused(tmp_path: Path, files: list[str], message: str) -> None:
    """What was found and what was expected stands in the error, with the folder."""
    for name in files:
        picture(tmp_path / name, 1)
    with pytest.raises(InputError, match=message) as error:
        folders.find(tmp_path, ["a", "b"])
    assert str(tmp_path) in str(error.value)
    with pytest.raises(InputError, match="is not a folder"):
        folders.find(tmp_path / "missing")


def test_division_of_one_level(tmp_path: Path) -> None:
    """Disjoint, complete, the same for the same seed, every class in every part by its share."""
    root = by_class(tmp_path, {"a": 40, "b": 20})
    parts = folders.divide(root, held_out=0.25, test=0.5, seed=3)
    assert [len(part) for part in parts] == [pytest.approx(n, abs=1) for n in (22, 8, 30)]
    files = [str(item) for part in parts for item in part.items]
    assert len(set(files)) == len(files) == 60
    for part in parts:
        assert part.labels is not None
        assert (part.labels == 0).mean() == pytest.approx(2 / 3, abs=0.1)
    again = folders.divide(root, held_out=0.25, test=0.5, seed=3)
    other = folders.divide(root, held_out=0.25, test=0.5, seed=4)
    assert [part.sha256() for part in again] == [part.sha256() for part in parts]
    assert other.test.sha256() != parts.test.sha256()


def test_division_keeps_a_test_part(tmp_path: Path) -> None:
    """The folder's own test part is taken whole, with the classes of the training part."""
    by_class(tmp_path / "train", {"a": 8, "b": 8})
    by_class(tmp_path / "test", {"b": 3})
    parts = folders.divide(tmp_path, held_out=0.25)
    assert [len(part) for part in parts] == [12, 4, 3]
    assert parts.test.classes == ["a", "b"]
    assert parts.test.labels is not None
    assert parts.test.labels.tolist() == [1, 1, 1]


def test_too_few_to_divide(tmp_path: Path) -> None:
    """Fewer pictures than the message names leave a part empty, that many never do; one class is none."""
    root = by_class(tmp_path / "few", {"a": 3, "b": 3})
    with pytest.raises(InputError, match="none is left for the held-out part, 7 are the least"):
        folders.divide(root, held_out=0.2)
    picture(root / "b" / "3.png", 200)
    assert all(min(map(len, folders.divide(root, held_out=0.2, seed=seed))) > 0 for seed in range(50))
    tested = by_class(tmp_path / "tested", {"train/a": 2, "train/b": 2, "test/a": 1})
    with pytest.raises(InputError, match="held-out part, 10 to train on are the least"):
        folders.divide(tested, held_out=0.1)
    with pytest.raises(InputError, match="class 'a' alone"):
        folders.divide(by_class(tmp_path / "one", {"a": 30}))


def test_hash_is_of_content_and_labels(tmp_path: Path) -> None:
    """Other names give the same hash; another picture or another label does not."""
    first = folders.find(by_class(tmp_path / "one", {"a": 2, "b": 1}))
    root = by_class(tmp_path / "two", {"a": 2, "b": 1})
    (root / "a" / "0.png").rename(root / "a" / "z.png")
    assert folders.find(root).sha256() == first.sha256()
    assert re.fullmatch("[0-9a-f]{64}", first.sha256())
    assert folders.find(root, ["b", "a"]).sha256() != first.sha256()
    picture(root / "b" / "0.png", 200)
    assert folders.find(root).sha256() != first.sha256()
