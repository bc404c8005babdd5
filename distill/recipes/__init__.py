"""Recipes: pure functions from a snapshot to training examples, found by name.

A recipe emits the task's own messages and the run, nothing from memory and no system prompt:
`distill.dataset` puts the prompt in front as it is served. Others are added by packages through the
entry point group `nightschool.recipes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import entry_points

from distill.recipes.contrast import contrast
from distill.recipes.contrast_runs import contrast_runs
from distill.recipes.corrections import corrections
from distill.recipes.dissatisfaction import dissatisfaction
from distill.recipes.internalise import internalise
from distill.recipes.intervene import intervene
from distill.recipes.preference import preference
from distill.recipes.revise import revise
from distill.recipes.successes import successes
from distill.recipes.teacher import teacher
from distill.recipes.weighted_successes import weighted_successes
from distill.snapshot import Snapshot
from memory.errors import ConfigError, boundary
from memory.records import Example

Recipe = Callable[[Snapshot], Iterable[Example]]

GROUP = "nightschool.recipes"

RECIPES: dict[str, Recipe] = {
    "corrections": corrections,
    "successes": successes,
    "contrast": contrast,
    "contrast_runs": contrast_runs,
    "internalise": internalise,
    "intervene": intervene,
    "revise": revise,
    "dissatisfaction": dissatisfaction,
    "preference": preference,
    "teacher": teacher,
    "weighted_successes": weighted_successes,
}
"""The built-in recipes by name; a night runs those that `night.recipes` names, in that order."""


def installed() -> list[str]:
    """Names of the recipes that other packages add."""
    return sorted({point.name for point in entry_points(group=GROUP)} - RECIPES.keys())


def load(names: Iterable[str]) -> dict[str, Recipe]:
    """The recipes of these names, in this order; a built-in one cannot be replaced.

    Raises ConfigError for an unknown name, listing the known ones, and for a recipe that fails to load.
    """
    added = {point.name: point for point in entry_points(group=GROUP)}
    loaded: dict[str, Recipe] = {}
    for name in names:
        if name in RECIPES:
            loaded[name] = RECIPES[name]
        elif name in added:
            with boundary(ConfigError, f"the recipe {name!r} cannot be loaded"):
                loaded[name] = added[name].load()
        else:
            known = ", ".join(sorted({*RECIPES, *added}))
            raise ConfigError(f"unknown recipe {name!r}; known: {known}")
    return loaded
