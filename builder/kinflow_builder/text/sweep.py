"""Where to cut: branches of several sizes behind several layers, each trained for a few minutes, and what they reach.

Run as `python -m kinflow_builder.text.sweep RECIPE_FOLDER 12x1 16x2 …` (layers below the split x layers of the branch);
writes branches/sweep.json, which the card plots. The corpus must keep the hidden values after those layers: it is
written into work/ for the recipe's own splits and those named here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch

from kinflow_builder.log import BuildLog
from kinflow_builder.text import recipe as recipes
from kinflow_builder.text.bridge import begun
from kinflow_builder.text.build import TextBuild, load_model
from kinflow_builder.text.distil import Trainer, agreement
from kinflow_builder.text.lessons import corpus, lesson
from kinflow_builder.text.llama import Llama, stack_of
from kinflow_builder.text.points import Point, cost_share, write
from kinflow_builder.text.train import HELD_OUT

# Texts of the corpus that each branch is trained on, once.
TEXTS = 128


def sweep(folder: Path, wanted: list[tuple[int, int]], log: BuildLog) -> list[Point]:
    """One Point for each (layers below the split, layers of the branch)."""
    recipe = recipes.load(folder)
    torch.set_num_threads(recipe.training.threads)
    build = TextBuild(folder, folder / "bundle", recipe, log)
    model, texts = load_model(build)
    layers = sorted({recipe.cut.s1, recipe.cut.s2, *(after for after, _ in wanted)})
    written = corpus(recipe, model, texts, build.work, log, layers)
    own = [text for part in written for text in part.own][-HELD_OUT:]
    spec = msgspec.structs.replace(recipe.training, epochs=1)
    llama, head = Llama(model), torch.from_numpy(model.head)
    points = []
    for after, count in wanted:
        lessons = lesson(written, after)
        known = lessons.part(0, min(TEXTS, len(lessons) - HELD_OUT))
        unseen = lessons.part(len(lessons) - HELD_OUT, len(lessons))
        branch = begun(llama, after, count, known.features)
        trainer = Trainer(stack_of(model.shape, branch), head, known, spec)
        before = agreement(trainer.branch, trainer.head, unseen, own)
        with log.progress(f"{count} after {after}", trainer.steps) as bar:
            trainer.run_epoch(bar.advance)
        reached = agreement(trainer.branch, trainer.head, unseen, own)
        cost = round(cost_share(model.shape, after, count), 4)
        points.append(Point(after, count, cost, round(before, 4), round(reached, 4), len(known)))
        log.line(f"{count} after {after}: {cost:.0%} of the cost, agreement {before:.1%}, trained {reached:.1%}")
    return points


def main() -> None:
    folder = Path(sys.argv[1])
    wanted = [(int(after), int(count)) for after, _, count in (pair.partition("x") for pair in sys.argv[2:])]
    (folder / "work").mkdir(exist_ok=True)
    points = sweep(folder, wanted, BuildLog(folder / "work/sweep.log"))
    write(folder, points)


if __name__ == "__main__":
    main()
