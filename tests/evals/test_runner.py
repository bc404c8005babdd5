from __future__ import annotations

import asyncio

import pytest

from agent.llm import ChatRequest, ScriptedModel
from agent.run import AgentDeps, ModelRef
from agent.state import AgentConfig
from evals.gate import decide
from evals.runner import evaluate
from evals.suites import EvalTask, Suite
from memory.errors import ConfigError, ContextLengthError, ModelError, VerifierError
from memory.night_records import Evaluation
from memory.recall import Recall
from memory.records import Purpose, Task, Trajectory, VerifierSpec, text_of


def words(n: int, verifier: VerifierSpec | None = None) -> Suite:
    judged = verifier or VerifierSpec(name="exact")
    tasks = [
        Task(messages=[{"role": "user", "content": f"Say {i}"}], tools=[], reference=str(i), verifier=judged)
        for i in range(n)
    ]
    return Suite(name="words", role="held_out", tasks=[EvalTask(key=str(i), task=t) for i, t in enumerate(tasks)])


def number(request: ChatRequest) -> str:
    return text_of(request.messages[-1]).removeprefix("Say ")


def run(
    suite: Suite, deps: AgentDeps, memory: bool = False, concurrency: int = 2
) -> tuple[Evaluation, list[Trajectory]]:
    return asyncio.run(
        evaluate(
            suite,
            ModelRef(generation=3, name="gen-3@abc"),
            deps,
            memory=memory,
            memory_watermark="41",
            concurrency=concurrency,
            on_progress=lambda done, total: None,
        )
    )


def test_outcomes_stand_in_the_suites_order_with_their_runs() -> None:
    deps = AgentDeps(llm=ScriptedModel(lambda r: number(r) if number(r) != "2" else "no"))
    evaluation, trajectories = run(words(5), deps)
    assert [o.success for o in evaluation.outcomes] == [True, True, False, True, True]
    assert [o.trajectory_id for o in evaluation.outcomes] == [t.id for t in trajectories]
    spent = [(o.prompt_tokens, o.completion_tokens) for o in evaluation.outcomes]
    assert spent == [(sum(s.prompt_tokens or 0 for s in t.steps), 1) for t in trajectories]
    assert evaluation.suite_hash == words(5).hash
    assert (evaluation.generation, evaluation.settings["max_turns"]) == (3, 4)
    assert {t.purpose for t in trajectories} == {Purpose.EVAL}


def test_progress_is_told_from_nothing_to_all() -> None:
    seen: list[tuple[int, int]] = []
    asyncio.run(
        evaluate(
            words(3),
            ModelRef(0, "base"),
            AgentDeps(llm=ScriptedModel(number)),
            memory=False,
            memory_watermark="",
            concurrency=1,
            on_progress=lambda done, total: seen.append((done, total)),
        )
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_where_answers_are_sampled_the_same_task_has_the_same_seed_for_every_generation() -> None:
    def seeds(temperature: float, generation: int) -> list[object]:
        model = ScriptedModel(number)
        deps = AgentDeps(llm=model, config=AgentConfig(temperature=temperature))
        given = {"memory_watermark": "", "concurrency": 2, "on_progress": lambda done, total: None}
        asyncio.run(evaluate(words(3), ModelRef(generation, "a model"), deps, memory=False, **given))
        return [r.sampling.get("seed") for r in sorted(model.requests, key=number)]

    drawn = seeds(0.7, 3)
    assert drawn == seeds(0.7, 4) == [100585142, 112749351, 222770659]
    assert seeds(0.0, 3) == [None] * 3, "what greedy requests ask stays as it was"


class CountingMemory:
    """Recalls nothing and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def recall(self, task: Task, **_: object) -> Recall:
        self.asked += 1
        return Recall()


def test_memory_is_asked_only_when_it_is_on() -> None:
    memory = CountingMemory()
    deps = AgentDeps(llm=ScriptedModel(number), recaller=memory)
    without, _ = run(words(2), deps, memory=False)
    assert (memory.asked, without.memory_watermark) == (0, "")
    with_it, _ = run(words(2), deps, memory=True)
    assert (memory.asked, with_it.memory, with_it.memory_watermark) == (2, True, "41")
    with pytest.raises(ConfigError, match="memory differs"):
        decide([(without, with_it)], [])


def test_an_engine_error_is_tried_once_more() -> None:
    model = ScriptedModel([ModelError("gone"), "0"])
    evaluation, _ = run(words(1), AgentDeps(llm=model))
    assert evaluation.success == 1
    assert len(model.requests) == 2


def test_an_evaluation_with_a_hole_is_not_returned() -> None:
    broken = ScriptedModel(lambda r: ModelError("the engine is gone") if number(r) == "1" else number(r))
    with pytest.raises(ModelError, match="task '1' of suite 'words' failed twice on gen-3@abc: the engine is gone"):
        run(words(3), AgentDeps(llm=broken))


def test_a_conversation_that_outgrew_the_context_is_a_failed_task() -> None:
    rambling = ScriptedModel(lambda r: ContextLengthError("too long") if number(r) == "1" else number(r))
    evaluation, _ = run(words(3), AgentDeps(llm=rambling))
    assert [o.success for o in evaluation.outcomes] == [True, False, True]


def test_a_task_that_cannot_be_judged_is_refused() -> None:
    with pytest.raises(VerifierError, match="task '0' could not be judged"):
        run(words(1, VerifierSpec(name="no such verifier")), AgentDeps(llm=ScriptedModel(number)))


def test_of_a_suite_made_from_days_what_cannot_be_judged_is_left_out_and_named() -> None:
    slow = VerifierSpec(name="regex", args={"pattern": r"(a|aa)+$"})
    deps = AgentDeps(llm=ScriptedModel(lambda r: "a" * 60 + "!" if number(r) == "1" else "a"))
    suite = words(3, slow).model_copy(update={"from_days": True})
    evaluation, trajectories = run(suite, deps)
    assert [(o.key, o.success) for o in evaluation.outcomes] == [("0", True), ("2", True)]
    assert (evaluation.unjudged, len(trajectories)) == (["1"], 3)
    with pytest.raises(VerifierError, match="task '1' could not be judged"):
        run(words(3, slow), deps)


def test_at_most_so_many_tasks_run_at_once() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        run(words(1), AgentDeps(llm=ScriptedModel(number)), concurrency=0)


def test_an_empty_suite_has_no_success_rate() -> None:
    evaluation, trajectories = run(words(0), AgentDeps(llm=ScriptedModel(number)))
    assert (evaluation.success, trajectories) == (None, [])
