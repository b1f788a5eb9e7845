"""Trains a family's branches: the corpus first, then one branch after the other, then figures of what they became."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from kinflow_builder import checkpoint
from kinflow_builder.text.bridge import begun
from kinflow_builder.text.bundle import write_graphs
from kinflow_builder.text.distil import Lesson, Trainer, agreement
from kinflow_builder.text.figures import Figures, Graphs, Promise, measure
from kinflow_builder.text.lessons import corpus, lesson
from kinflow_builder.text.llama import Llama, branch_of, stack_of, whole
from kinflow_builder.text.samples import samples
from kinflow_builder.text.shape import Branch, Model, Texts
from kinflow_builder.text.shortlist import Sketch, fit
from kinflow_builder.text.stored import rounded, rounded_sketch

if TYPE_CHECKING:
    from kinflow_builder.text.build import TextBuild

# Of the corpus: agreement is logged on them, they are not trained on.
HELD_OUT = 32
# Texts that a branch reads together.
BATCH = 8


def trained(build: TextBuild, model: Model, texts: Texts, *, fresh: bool) -> dict[str, Branch]:
    """Branches by exit, rounded as they are stored.

    Every finished batch of texts and every epoch is saved in the work folder; the next call goes on from there, with
    the same result as in one go, unless `fresh`.
    """
    recipe, work = build.recipe, build.work
    torch.set_num_threads(recipe.training.threads)
    torch.manual_seed(recipe.training.seed)
    if fresh:
        for path in work.glob("*.pt"):
            path.unlink()
    if not any(work.glob("*.pt")):
        build.log.truncate()
        build.log.line(f"{recipe.id} {recipe.version}: seed {recipe.training.seed}")
    splits = {"device": recipe.cut.s1, "edge": recipe.cut.s2}
    written = corpus(recipe, model, texts, work, build.log, tuple(splits.values()))
    own = [text for part in written for text in part.own]
    branches = {}
    for exit, layers in (("device", recipe.cut.device_layers), ("edge", recipe.cut.edge_layers)):
        lessons = lesson(written, splits[exit])
        branches[exit] = rounded(_learn(build, model, exit, splits[exit], layers, lessons, own))
    return branches


def sketched(build: TextBuild, model: Model, texts: Texts, branch: Branch) -> Sketch:
    """For the device's exit, from its hidden values on the corpus' first batch; rounded as it is stored."""
    recipe = build.recipe
    first = msgspec.structs.replace(recipe, corpus=msgspec.structs.replace(recipe.corpus, batches=1))
    (written,) = corpus(first, model, texts, build.work, build.log, (recipe.cut.s1, recipe.cut.s2))
    stack = stack_of(model.shape, branch)
    with torch.inference_mode():
        parts = [whole(stack, features.float())[0] for features in written.features[recipe.cut.s1].split(BATCH)]
    return rounded_sketch(fit(torch.cat(parts).flatten(0, 1).numpy(), model.head))


def measured(build: TextBuild, model: Model, texts: Texts, branches: dict[str, Branch], sketch: Sketch) -> Figures:
    """By the graphs that ship."""
    check = build.recipe.check
    found = samples(build.recipe, model, texts, build.data, build.log)
    with tempfile.TemporaryDirectory() as folder:
        write_graphs(Path(folder), model, build.recipe.cut, branches, sketch, done=lambda _: None)
        threads = build.recipe.training.threads
        graphs, exact = (Graphs(Path(folder), precision, threads) for precision in ("int8", "float"))
        figures = measure(graphs, exact, found, Promise(check.epsilon, check.delta))
    for exit, values in figures.exits.items():
        times = values.perplexity / figures.perplexity_float
        perplexity = f"perplexity {values.perplexity:.2f}, {times:.3f} of the largest's"
        build.log.line(f"exit {exit}: agreement {values.agreement:.1%}, {perplexity}")
    place = (
        "a CUDA device"
        if torch.cuda.is_available()
        else "a thread of a processor"
        if threads == 1
        else f"{threads} threads of a processor"
    )
    return msgspec.structs.replace(figures, trained_on=place)


def _learn(
    build: TextBuild, model: Model, exit: str, after: int, layers: int, lessons: Lesson, own: list[torch.Tensor]
) -> Branch:
    spec, log = build.recipe.training, build.log
    path, digest = build.work / f"branch-{exit}.pt", build.recipe.digest()
    state = checkpoint.load(path, digest)
    known, unseen = lessons.part(0, len(lessons) - HELD_OUT), lessons.part(len(lessons) - HELD_OUT, len(lessons))
    branch = begun(Llama(model), after, layers, known.features)
    trainer = Trainer(stack_of(model.shape, branch), torch.from_numpy(model.head), known, spec)
    if state is not None:
        trainer.load_state(state)
        log.line(f"branch {exit}: resumed after epoch {trainer.epoch}")
    with log.progress(f"branch {exit}", spec.epochs * trainer.steps, trainer.epoch * trainer.steps) as bar:
        while trainer.epoch < spec.epochs:
            begin, begin_cpu = time.monotonic(), time.process_time()
            divergence = trainer.run_epoch(bar.advance)
            checkpoint.save(path, digest, trainer.state())
            agreed = agreement(trainer.branch, trainer.head, unseen, own[len(lessons) - HELD_OUT :])
            seconds, cpu = time.monotonic() - begin, time.process_time() - begin_cpu
            log.line(
                f"branch {exit}: epoch {trainer.epoch}/{spec.epochs}: {seconds:.0f} s ({cpu:.0f} s of CPU), "
                f"divergence {divergence:.4f}, agreement on own texts {agreed:.1%}"
            )
    return branch_of(trainer.branch)
