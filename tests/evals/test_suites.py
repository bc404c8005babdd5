from __future__ import annotations

from pathlib import Path

import pytest

from agent.verify import verify
from evals.chat import SHORT, chat_suite
from evals.suites import (
    TRAINED_FAMILIES,
    UNTRAINED_FAMILIES,
    EvalTask,
    Suite,
    load_suite,
    reasoning_gym_suite,
    reasoning_gym_tasks,
    save_suite,
    tool_validity_suite,
    untrained_suite,
)
from memory.errors import ConfigError
from memory.records import Task


def small(seed: int = 5, exclude: frozenset[str] = frozenset()) -> Suite:
    families = {name: TRAINED_FAMILIES[name] for name in ("gcd", "letter_counting")}
    return reasoning_gym_suite(families, 3, seed, "small", "held_out", exclude)


def test_building_a_suite_again_gives_the_same_records_and_hash() -> None:
    assert small() == small()
    assert small().hash == small().hash != small(seed=6).hash


def test_the_hash_follows_what_is_asked_and_how_it_is_judged_not_who_asks() -> None:
    suite = small()
    asked = suite.tasks[0].task

    def changed(**update: object) -> str:
        task = asked.model_copy(update=update)
        return suite.model_copy(update={"tasks": [EvalTask(key=suite.tasks[0].key, task=task), *suite.tasks[1:]]}).hash

    assert changed(id="task_other", tenant="acme") == suite.hash
    assert changed(reference="0") != suite.hash
    assert changed(tools=[]) != suite.hash
    assert changed(verifier=None) != suite.hash


def test_a_task_is_one_line_of_text_with_a_calculator_and_its_own_verifier() -> None:
    for item in small().tasks:
        assert item.task.workload in ("gcd", "letter_counting")
        assert item.task.tools == ["calculator"]
        assert "\n" not in item.task.question
        assert item.task.reference is not None
        outcome = verify(item.task, item.task.reference)
        assert outcome is not None
        assert outcome.success
        stored = Task.model_validate_json(item.task.model_dump_json())
        assert stored == item.task


def test_no_question_is_asked_twice_or_taken_from_the_excluded() -> None:
    first = small()
    second = small(exclude=first.fingerprints)
    assert len(second.tasks) == 6
    assert not first.fingerprints & second.fingerprints
    many = reasoning_gym_suite({"gcd": {}}, 60, 1, "many", "held_out")
    assert len(many.fingerprints) == 60


def test_a_day_keeps_clear_of_the_held_out_suite() -> None:
    suite = small()
    day = reasoning_gym_tasks({"gcd": {}}, 5, seed=5, source="day-1", exclude=suite.fingerprints)
    assert not {task.fingerprint for task in day} & suite.fingerprints
    assert {task.source for task in day} == {"day-1"}


def test_a_family_without_enough_questions_is_refused() -> None:
    with pytest.raises(ConfigError, match="has only"):
        reasoning_gym_suite({"gcd": {"min_value": 1, "max_value": 2}}, 30, 1, "few", "held_out")


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no_such_family"):
        reasoning_gym_suite({"no_such_family": {}}, 1, 1, "none", "held_out")


def test_a_saved_suite_is_loaded_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "suites" / "small.jsonl"
    for suite in (small(), small().model_copy(update={"from_days": True})):
        save_suite(suite, path)
        assert load_suite(path) == suite


def test_a_suite_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.jsonl"
    suite = small()
    save_suite(suite, path)
    text = path.read_text(encoding="utf-8")
    reference = suite.tasks[0].task.reference
    path.write_text(text.replace(f'"reference":"{reference}"', '"reference":"-1"', 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="was changed after it was frozen"):
        load_suite(path)
    path.write_text("\n".join(text.splitlines()[:-1]), encoding="utf-8")
    with pytest.raises(ConfigError, match="was changed after it was frozen"):
        load_suite(path)


def test_a_broken_line_of_a_suite_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "small.jsonl"
    save_suite(small(), path)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], "{broken", *lines[3:]]), encoding="utf-8")
    with pytest.raises(ConfigError, match="line 3 is broken"):
        load_suite(path)
    for text in ("", "[]\n", "{}\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="line 1 is broken"):
            load_suite(path)
    with pytest.raises(ConfigError, match="there is no suite file"):
        load_suite(tmp_path / "missing.jsonl")


def test_a_question_with_line_ends_of_its_own_comes_back_whole(tmp_path: Path) -> None:
    """Pasted text holds U+2028 and the like, and JSON leaves them in its strings."""
    task = Task(messages=[{"role": "user", "content": "One\u2028two\u2029three\x85four\x1cfive"}], reference="5")
    suite = Suite(name="pasted", role="held_out", tasks=[EvalTask(key="1", task=task)])
    save_suite(suite, tmp_path / "pasted.jsonl")
    assert load_suite(tmp_path / "pasted.jsonl") == suite


def test_a_suite_with_a_key_twice_is_refused() -> None:
    item = small().tasks[0]
    with pytest.raises(ValueError, match="twice"):
        Suite(name="twice", role="control", tasks=[item, item])


def test_the_controls_are_about_two_dozen_tasks_of_their_own_kind() -> None:
    chat, form, untrained = chat_suite(), tool_validity_suite(), untrained_suite()
    assert {s.role for s in (chat, form, untrained)} == {"control"}
    assert [len(s.tasks) for s in (chat, form, untrained)] == [SHORT, 24, 24]
    assert all(item.task.tools == [] for item in chat.tasks)
    assert {item.task.verifier.name for item in form.tasks if item.task.verifier} == {"action"}
    assert {item.task.workload for item in untrained.tasks} == set(UNTRAINED_FAMILIES)
    trained = {item.task.workload for item in form.tasks} & set(TRAINED_FAMILIES)
    assert not trained


def test_chat_is_passed_by_an_answer_and_failed_by_an_action() -> None:
    capital = chat_suite().tasks[0].task

    def score(answer: str) -> float:
        outcome = verify(capital, answer)
        assert outcome is not None
        return outcome.score

    assert score("The capital of France is Paris.") == 1
    assert score("SmolLM:") == 0
    assert score("Action: finish(Paris)") == 0
    assert len(chat_suite(1000).tasks) == 40
