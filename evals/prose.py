"""The text that is measured when none is given: prose written for this project, plain UTF-8, under its licence.

A story, an explanation, a journey, instructions, an essay, a letter and numbered facts: about 4,600 words, at least ten
windows of 512 tokens for any tokenizer in use. No model can have seen it in training before this project was published.
It is long enough to compare two files of one model, and too short to rank different models.
"""

from __future__ import annotations

from importlib.resources import files


def default_text() -> str:
    """The embedded evaluation text."""
    return (files("weightsmith.evals") / "prose.txt").read_text(encoding="utf-8")
