"""`internalise`: a success that memory helped with, taught without what memory showed.

Context distillation, off-policy: the teacher is the same model with hints in its prompt, the student does
without (Memento No More, arXiv 2502.01562). Rethinking Continual Experience Internalization (arXiv
2606.04703): the teacher's own text stays stable over rounds where on-policy distillation collapses.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill.recipes.successes import distinct_successes
from distill.snapshot import Snapshot
from memory.records import Example, Trajectory


def internalise(snapshot: Snapshot) -> Iterator[Example]:
    """The distinct successes of each question whose prompt held recalled principles or runs; shown bare only."""
    for example in distinct_successes(snapshot, _was_helped):
        yield example.model_copy(update={"recipe": "internalise", "bare": True})


def _was_helped(trajectory: Trajectory) -> bool:
    return any(not item.withheld for item in trajectory.recalled)
