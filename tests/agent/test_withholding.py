"""Served runs sometimes go without an item, to measure it; evaluations never do."""

from __future__ import annotations

import asyncio

import pytest

from agent.llm import ScriptedModel
from agent.run import run_task
from agent.state import AgentDeps, ModelRef
from memory.records import RECALLED, Purpose, Trajectory
from tests.agent.test_graph import PAST, RULE, SUM, Recalls


def ran(share: float, purpose: Purpose, trajectory_id: str = "traj_1") -> tuple[Trajectory, str]:
    """The run, and all that the model was shown."""
    model = ScriptedModel(["Action: finish(51)"])
    deps = AgentDeps(llm=model, recaller=Recalls(runs=[PAST], principles=[RULE]), withhold_share=share)
    doing = run_task(SUM, ModelRef(0, "base"), deps, purpose=purpose, trajectory_id=trajectory_id)
    return asyncio.run(doing), str(model.requests[0].messages)


def test_a_withheld_item_is_on_the_record_and_not_in_the_prompt() -> None:
    trajectory, shown = ran(1.0, Purpose.SERVE)
    assert [(item.id, item.withheld) for item in trajectory.recalled] == [(PAST.id, True), (RULE.id, True)]
    assert "What is 2 * 3?" not in shown
    assert RULE.text not in shown
    assert not any(message.get("name") == RECALLED for message in trajectory.messages)


@pytest.mark.parametrize("purpose", [Purpose.EVAL, Purpose.UNTAUGHT])
def test_only_runs_that_teach_go_without(purpose: Purpose) -> None:
    trajectory, shown = ran(1.0, purpose)
    assert [item.withheld for item in trajectory.recalled] == [False, False]
    assert "What is 2 * 3?" in shown
    assert RULE.text in shown


def test_each_item_is_withheld_by_itself_and_the_same_run_goes_the_same_way() -> None:
    runs = [ran(0.5, Purpose.SERVE, f"traj_{n}")[0] for n in range(64)]
    gone = {frozenset(item.id for item in run.recalled if item.withheld) for run in runs}
    assert gone == {frozenset(), frozenset({PAST.id}), frozenset({RULE.id}), frozenset({PAST.id, RULE.id})}
    first, again = ran(0.5, Purpose.SERVE, "traj_7"), ran(0.5, Purpose.SERVE, "traj_7")
    assert first[0].recalled == again[0].recalled


def test_a_withheld_run_whose_tools_are_not_offered_would_not_have_been_shown() -> None:
    model = ScriptedModel(["51"])
    deps = AgentDeps(llm=model, recaller=Recalls(runs=[PAST]), withhold_share=1.0)
    plain = SUM.model_copy(update={"tools": []})
    trajectory = asyncio.run(run_task(plain, ModelRef(0, "base"), deps, purpose=Purpose.SERVE))
    assert trajectory.recalled == []
