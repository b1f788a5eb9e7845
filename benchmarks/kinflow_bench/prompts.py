"""Questions that anyone has: forty subjects, five ways to ask."""

from __future__ import annotations

import json
from pathlib import Path

from kinflow.errors import InputError

SUBJECTS = """
the moon; bread; volcanoes; chess; bees; the bicycle; rainbows; money; elephants; the internet; salt; dreams; bridges;
coffee; gravity; cats; the heart; glass; deserts; music; paper; sharks; clocks; tea; the printing press; snow; rivers;
electricity; dogs; tomatoes; mountains; robots; the alphabet; trains; whales; chocolate; lighthouses; vaccines; soap;
sleep
"""
QUESTIONS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "List three facts about {}.",
    "Why do people care about {}?",
    "What would be different without {}?",
)


def prompts(count: int, data: Path | None) -> list[str]:
    """The first `count`; of `data` the lines, or the field `question` of its JSON lines. Raises InputError."""
    if data is None:
        subjects = [subject.strip() for subject in SUBJECTS.split(";")]
        found = [question.format(subject) for subject in subjects for question in QUESTIONS]
    else:
        lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [str(json.loads(line)["question"]) if line.startswith("{") else line for line in lines]
    if count > len(found):
        raise InputError(f"{count} prompts are asked for, there are {len(found)}")
    return found[:count]
