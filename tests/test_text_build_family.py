"""From a recipe to a text family: corpus, distilled branches, figures, card; resumed, refused, made again."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")
pytest.importorskip("gguf", reason="pip install 'kinflow[builder]'")
pytest.importorskip("safetensors", reason="pip install 'kinflow[builder]'")

from kinflow.errors import InputError, SettingsError
from kinflow.text.family import TextFamily
from kinflow_builder.cli import build
from kinflow_builder.text import stored
from kinflow_builder.text.conversation import frame, speakers, tokenizer_of
from kinflow_builder.text.corpus import _sampled, converse
from kinflow_builder.text.cut import Cut
from kinflow_builder.text.distil import _divergence, _some
from kinflow_builder.text.huggingface import read
from kinflow_builder.text.llama import Llama
from kinflow_builder.text.recipe import load
from kinflow_builder.text.tiny import SHAPE, random_model
from tiny_llama import write_huggingface, write_recipe

pytestmark = pytest.mark.builder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the random model."""
    folder = tmp_path_factory.mktemp("text") / "model"
    write_huggingface(folder, random_model(0))
    return folder


@pytest.fixture(scope="module")
def trained(model: Path) -> Path:
    """A family's folder whose bundle is built, branches trained on the way."""
    folder = model.parent / "family"
    write_recipe(folder, model)
    build(folder)
    return folder


def test_bundle_is_whole(trained: Path) -> None:
    """The bundle loads, its graphs run, and the card says what was measured."""
    family = TextFamily.load(trained / "bundle")
    manifest = family.manifest
    assert [split.after_layer for split in manifest.splits.values()] == [2, 4]
    assert manifest.segments["branch-edge"].layers == 1
    ids = np.array([family.tokenizer().encode("hello")])
    values = ids
    for name in manifest.exits["device"].segments:
        segment = family.segment(name, "int8")
        values = segment.run(values, [segment.past()])
    assert family.head("int8").run(values[0]).shape == (5, SHAPE.vocabulary)
    card = (trained / "bundle/card.md").read_text()
    assert f"{100 * manifest.exits['device'].agreement:.2f}%" in card
    # Only the device's 8 bits are between the cloud's exit and the model.
    assert 0.9 < manifest.exits["cloud"].agreement <= 1
    assert manifest.exits["device"].agreement < manifest.exits["cloud"].agreement


def test_training_brings_branches_nearer(trained: Path) -> None:
    """Epoch after epoch the divergence falls, and the log has a line for each."""
    lines = (trained / "train.log").read_text().splitlines()
    for exit in ("device", "edge"):
        epochs = [line for line in lines if line.startswith(f"branch {exit}: epoch")]
        first, last = (float(line.split("divergence ")[1].split(",")[0]) for line in epochs)
        assert last < first


def test_stored_branches_need_no_training(trained: Path, model: Path, tmp_path: Path) -> None:
    """With the branches beside the recipe the same bundle is made without a corpus, a checkpoint or torch."""
    folder = tmp_path / "family"
    write_recipe(folder, model)
    shutil.copytree(trained / "branches", folder / "branches")
    script = f"""
import sys
from pathlib import Path
from kinflow_builder.cli import build
build(Path({str(folder)!r}))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert not (folder / "work").exists()
    assert (folder / "bundle/family.json").read_bytes() == (trained / "bundle/family.json").read_bytes()


@pytest.mark.parametrize("missing", ["shortlist.safetensors", "figures.json"])
def test_what_is_missing_is_made_without_training(trained: Path, model: Path, tmp_path: Path, missing: str) -> None:
    """Shortlist and figures come anew from the branches that are there, the same as with them."""
    folder = tmp_path / "family"
    write_recipe(folder, model)
    shutil.copytree(trained / "branches", folder / "branches", ignore=shutil.ignore_patterns(missing))
    build(folder)
    for name in ("device.safetensors", "figures.json"):
        assert (folder / "branches" / name).read_bytes() == (trained / "branches" / name).read_bytes()
    digest = load(folder).digest()
    old, new = (stored.read_sketch(stored.path_of(where, stored.SHORTLIST), digest) for where in (trained, folder))
    np.testing.assert_allclose(new.up @ new.down, old.up @ old.down, atol=0.01)
    assert not list((folder / "work").glob("branch*"))


def test_a_broken_shortlist_is_named(trained: Path, model: Path, tmp_path: Path) -> None:
    """And the way out."""
    folder = tmp_path / "family"
    write_recipe(folder, model)
    shutil.copytree(trained / "branches", folder / "branches")
    shutil.copy(folder / "branches/edge.safetensors", folder / "branches/shortlist.safetensors")
    with pytest.raises(InputError, match=r"shortlist\.safetensors.*delete it"):
        build(folder)


def test_interrupted_training_goes_on(trained: Path, model: Path, tmp_path: Path) -> None:
    """Stopped after a batch of texts and one epoch, the next call ends with the very same branch."""
    folder = tmp_path / "family"
    write_recipe(folder, model)
    (folder / "work").mkdir()
    shutil.copy(trained / "work/corpus-000.pt", folder / "work")
    state = _after_one_epoch(folder, model)
    assert state["epoch"] == 1
    build(folder)
    digest = load(folder).digest()
    for exit in ("device", "edge"):
        once, resumed = (stored.read(stored.path_of(where, exit), digest) for where in (trained, folder))
        np.testing.assert_allclose(resumed.layers[0]["down"], once.layers[0]["down"], atol=1e-5)
    assert "resumed after epoch 1" in (folder / "train.log").read_text()


def _after_one_epoch(folder: Path, model: Path) -> dict[str, object]:
    """Leaves the checkpoint of the device's branch as an interruption would."""
    from kinflow_builder import checkpoint
    from kinflow_builder.log import BuildLog
    from kinflow_builder.text.bridge import begun
    from kinflow_builder.text.distil import Trainer
    from kinflow_builder.text.lessons import corpus, lesson
    from kinflow_builder.text.llama import stack_of
    from kinflow_builder.text.train import HELD_OUT

    recipe = load(folder)
    weights, texts = read(model)
    torch.set_num_threads(1)
    written = corpus(recipe, weights, texts, folder / "work", BuildLog(folder / "train.log"), (2, 4))
    lessons = lesson(written, 2)
    known = lessons.part(0, len(lessons) - HELD_OUT)
    branch = begun(Llama(weights), 2, 1, known.features)
    trainer = Trainer(stack_of(SHAPE, branch), torch.from_numpy(weights.head), known, recipe.training)
    trainer.run_epoch(lambda: None)
    checkpoint.save(folder / "work/branch-device.pt", recipe.digest(), trainer.state())
    return trainer.state()


def test_branches_of_another_recipe_are_refused(trained: Path, model: Path, tmp_path: Path) -> None:
    """After a change of the recipe the old branches are not used, and the way out is named."""
    folder = tmp_path / "family"
    write_recipe(folder, model, epochs=3)
    shutil.copytree(trained / "branches", folder / "branches")
    with pytest.raises(SettingsError, match="--train"):
        build(folder)
    write_recipe(folder, model)
    (folder / "branches/device.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"device\.safetensors"):
        build(folder)
    assert not (folder / "bundle").exists()


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut(4, 4, 1, 1), "s1 is 4, s2 4"),
        (Cut(2, 6, 1, 1), "s2 6"),
        (Cut(2, 4, 5, 1), "device_layers is 5"),
        (Cut(2, 4, 1, 0), "edge_layers is 0"),
    ],
)
def test_impossible_cut_is_named(cut: Cut, message: str) -> None:
    """Splits out of order and branches longer than what is left are errors that say so."""
    with pytest.raises(SettingsError, match=message):
        cut.check(SHAPE)


def test_corpus_is_what_the_model_would_say(model: Path) -> None:
    """Tokens marked as the model's own are its likeliest on the text before them, and features are its layers'."""
    recipe_folder = model.parent / "corpus"
    write_recipe(recipe_folder, model)
    recipe = load(recipe_folder)
    weights, texts = read(model)
    tokenizer = tokenizer_of(texts)
    llama = Llama(weights)
    written = converse(llama, list(speakers(tokenizer, recipe.corpus, 0, 0)), 80, [2], 0, lambda: None)
    ids = written.ids.long()
    with torch.no_grad():
        logits = llama(ids)
        hidden, _ = _below(llama, ids, 2)
    said = logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert written.own.sum() > 50
    assert said[written.own[:, 1:]].float().mean() > 0.99
    assert said[~written.own[:, 1:]].float().mean() < 0.9
    torch.testing.assert_close(written.features[2].float(), hidden, atol=0.02, rtol=0.02)
    assert (written.likely[:, :-1, 0] == logits[:, :-1].argmax(-1)).float().mean() > 0.99


def _below(llama: Llama, ids: torch.Tensor, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    from kinflow_builder.text.llama import whole

    return whole(llama.part(0, layers), llama.embedding(ids))


def test_samples_follow_the_probabilities() -> None:
    """Drawn tokens come as often as softmax says at each row's temperature; at 0 it is the likeliest."""
    logits = torch.tensor([0.0, 2.0, 1.0, -9.0]).expand(30_000, -1)
    heats = torch.tensor([0.0, 0.5, 2.0]).repeat(10_000)
    drawn = _sampled(logits, heats, torch.Generator().manual_seed(0))
    assert set(drawn[::3].tolist()) == {1}
    for at, heat in ((1, 0.5), (2, 2.0)):
        shares = torch.bincount(drawn[at::3], minlength=4) / 10_000
        torch.testing.assert_close(shares, torch.softmax(logits[0] / heat, 0), atol=0.015, rtol=0)


def test_some_tokens_stand_for_all() -> None:
    """The divergence among likely tokens and some others is about that among all, which one without weights is not."""
    random = torch.Generator().manual_seed(0)
    head = torch.randn(5000, 16, generator=random) * 0.5
    final, hidden = torch.randn(2, 1, 64, 16, generator=random)
    likely = (final[0] @ head.T).topk(4).indices.flatten()
    tokens, weight = _some(likely, len(head), random)
    assert len(tokens.unique()) == len(tokens) < 1300
    whole = _divergence(hidden, final, head, torch.zeros(len(head)))
    weighted = _divergence(hidden, final, head[tokens], weight)
    torch.testing.assert_close(weighted, whole, rtol=0.03, atol=0)
    assert abs(_divergence(hidden, final, head[tokens], torch.zeros(len(tokens))) - whole) > 0.1 * whole


def test_corpus_grows(trained: Path, model: Path, tmp_path: Path) -> None:
    """More batches are written beside those that are there, which stay as they are."""
    from kinflow_builder.log import BuildLog
    from kinflow_builder.text.lessons import corpus

    folder = tmp_path / "family"
    write_recipe(folder, model)
    path = folder / "recipe.toml"
    path.write_text(path.read_text().replace("batches = 2", "batches = 3"))
    shutil.copytree(trained / "work", folder / "work", ignore=shutil.ignore_patterns("branch*"))
    before = (folder / "work/corpus-001.pt").stat().st_mtime_ns
    weights, texts = read(model)
    written = corpus(load(folder), weights, texts, folder / "work", BuildLog(folder / "train.log"), (2, 4))
    assert len(written) == 3
    assert (folder / "work/corpus-001.pt").stat().st_mtime_ns == before
    assert load(folder).digest() != load(trained).digest()


def test_conversations_follow_the_template(model: Path) -> None:
    """What stands between question and answer is the chat template's own, and a text begins as it does."""
    texts = read(model)[1]
    tokenizer = tokenizer_of(texts)
    found = frame(tokenizer)
    whole = tokenizer.chat([{"role": "user", "content": "x"}])
    assert found.opening + tokenizer.encode("x") + found.to_answer == whole
    assert found.to_question[0] == 2


def test_prompts_and_text_of_people_are_measured(trained: Path, model: Path, tmp_path: Path) -> None:
    """With a folder of questions and text the figures say that they are of these."""
    from kinflow_builder.log import BuildLog
    from kinflow_builder.text.samples import samples

    (tmp_path / "questions.jsonl").write_text('{"question": "Why?"}\n{"question": "How much?"}\n')
    (tmp_path / "prose.txt").write_text("It was a dark night. " * 40)
    weights, texts = read(model)
    log = BuildLog(tmp_path / "log")
    found = samples(load(trained), weights, texts, tmp_path, log)
    assert found.own_source == "questions that people wrote, and the model's own"
    assert len(found.own) == load(trained).check.texts
    asked = [tokenizer_of(texts).decode(row) for row in found.own]
    assert ["Why?" in text or "How much?" in text for text in asked[:5]] == [True, False, True, False, False]
    assert found.written.shape == (1, 256)
    tokenizer = tokenizer_of(texts)
    assert "".join(tokenizer.decode(row) for row in found.written).startswith("It was a dark night.")
    (tmp_path / "questions.jsonl").write_text("Why?\n")
    with pytest.raises(InputError, match=r"questions\.jsonl.*question"):
        samples(load(trained), weights, texts, tmp_path, log)


def test_too_short_texts_are_no_figures(model: Path, tmp_path: Path) -> None:
    """Texts that end before an answer begins are an error that says so, not a figure."""
    folder = tmp_path / "family"
    write_recipe(folder, model)
    path = folder / "recipe.toml"
    path.write_text(path.read_text().replace("tokens = 96", "tokens = 8").replace("texts = 32", "texts = 20"))
    with pytest.raises(InputError, match=r"check\.tokens"):
        build(folder)
    assert not (folder / "branches").exists()
