"""`weighted_successes`: what is seldom solved weighs more, and nothing else about the examples changes."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.dataset import DatasetConfig, build
from distill.recipes.successes import successes
from distill.recipes.weighted_successes import LEAST, MOST, weighted_successes
from distill.snapshot import Snapshot
from distill.train.render import render_row
from memory.records import Task, Trajectory
from serve.settings import NightConfig
from tests.distill.samples import OneRun, compose, say, snapshot, solve, task, trajectory
from tests.distill.train_fixtures import make_tokenizer

Runs = list[tuple[Task, Trajectory]]


def tried(number: int, won: int, lost: int, **fields: str) -> Runs:
    """A question's successes, all alike, and its failures."""
    asked = task(number, **fields)
    scores = [1.0] * won + [0.0] * lost
    return [
        (asked, trajectory(asked, solve(number) if score else [say("?")], score, id=f"traj_{number}_{n}"))
        for n, score in enumerate(scores)
    ]


def weights(material: Snapshot) -> dict[str, float]:
    return {e.task_id: e.weight for e in weighted_successes(material)}


def test_a_question_that_is_seldom_solved_weighs_more_than_one_that_always_is():
    hard, even, easy = tried(1, 1, 3), tried(2, 2, 2), tried(3, 4, 0)
    found = weights(snapshot(*hard, *even, *easy))
    assert found["task_0001"] > found["task_0002"] > found["task_0003"]
    # 1 - r is 4/6, 3/6 and 1/6; their mean is 4/9.
    assert found == {"task_0001": 1.5, "task_0002": 1.125, "task_0003": 0.375}


def test_a_question_that_was_tried_once_is_weighted_by_its_workload():
    hard = [*tried(1, 1, 0, workload="hard"), *tried(2, 0, 1, workload="hard"), *tried(3, 0, 1, workload="hard")]
    easy = [*tried(4, 1, 0, workload="easy"), *tried(5, 1, 0, workload="easy")]
    found = weights(snapshot(*hard, *easy))
    assert found["task_0001"] > found["task_0004"] == found["task_0005"]
    assert set(weights(snapshot(*tried(1, 1, 0), *tried(2, 1, 0))).values()) == {1.0}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 30)), min_size=1, max_size=12))
def test_weights_are_1_on_average_and_within_their_bounds(counts: list[tuple[int, int]]):
    found = weights(snapshot(*(run for n, (won, lost) in enumerate(counts) for run in tried(n, won, lost))))
    assert fmean(found.values()) == pytest.approx(1.0, abs=1e-3)
    assert all(LEAST <= weight <= MOST for weight in found.values())


def test_all_else_is_as_in_successes_and_the_weight_reaches_both_copies_and_the_trainer():
    material = snapshot(*tried(1, 1, 3), *tried(2, 4, 0))
    plain, weighted = list(successes(material)), list(weighted_successes(material))
    apart = {"id", "recipe", "weight"}
    assert [e.model_dump(exclude=apart) for e in weighted] == [e.model_dump(exclude=apart) for e in plain]

    def rows(recipe: str):
        return build(material, [recipe], OneRun(), compose, DatasetConfig(min_examples=1)).examples

    assert {e.id for e in rows("weighted_successes")} == {e.id for e in rows("successes")}
    assert {e.weight for e in rows("successes")} == {1.0}
    by_task: dict[str, set[float]] = {}
    for row in rows("weighted_successes"):
        by_task.setdefault(row.task_id, set()).add(row.weight)
        assert render_row(row, make_tokenizer()).weight == row.weight
    assert by_task == {e.task_id: {e.weight} for e in weighted}
    assert "weighted_successes" not in NightConfig().recipes
