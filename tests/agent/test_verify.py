from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.verify import check_verifier, judge_trajectory, verify
from memory.errors import VerifierError
from memory.records import Message, OutcomeSource, StopReason, Task, Trajectory, VerifierSpec


def task(verifier: str | None = None, reference: str | None = None, **args: Any) -> Task:
    spec = VerifierSpec(name=verifier, args=args) if verifier else None
    return Task(messages=[{"role": "user", "content": "?"}], reference=reference, verifier=spec)


def score(given: Task, answer: str | None) -> float:
    outcome = verify(given, answer)
    assert outcome is not None
    assert outcome.by is OutcomeSource.VERIFIER
    return outcome.score


def test_a_task_that_cannot_be_judged_has_no_outcome() -> None:
    assert verify(task(), "3") is None


def test_no_answer_scores_nothing() -> None:
    assert score(task(reference="3"), None) == 0


def test_a_reference_alone_is_judged_by_exact() -> None:
    outcome = verify(task(reference="three"), "Three")
    assert outcome is not None
    assert (outcome.score, outcome.detail, outcome.success) == (1.0, "exact", True)


@pytest.mark.parametrize(
    ("answer", "args", "expected"),
    [
        (" New \n york ", {}, 1),
        ("new york city", {}, 0),
        ("", {}, 0),
        ("new york", {"case_sensitive": True}, 0),
        ("New York", {"case_sensitive": True}, 1),
    ],
)
def test_exact_ignores_white_space_and_case(answer: str, args: dict[str, Any], expected: float) -> None:
    assert score(task("exact", "New York", **args), answer) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "args", "expected"),
    [
        ("42", "42", {}, 1),
        ("42.0", "42", {}, 1),
        ("6 * 7 makes 42.", "42", {}, 1),
        ("1,234.5", "1234.5", {}, 1),
        ("1234.5", "1,234.5", {}, 1),
        ("-3", "-3", {}, 1),
        ("3", "-3", {}, 0),
        (".5", "0.5", {}, 1),
        (".5", "5", {}, 0),
        ("1e3", "1000", {}, 1),
        ("3.14", "3.14159", {}, 0),
        ("3.14", "3.14159", {"tolerance": 0.01}, 1),
        ("none", "1", {}, 0),
        ("", "1", {}, 0),
        ("9" * 500, "1", {}, 0),
    ],
)
def test_numeric_compares_the_last_number(answer: str, reference: str, args: dict[str, Any], expected: float) -> None:
    assert score(task("numeric", reference, **args), answer) == expected


@pytest.mark.parametrize(
    ("given", "answer", "expected"),
    [
        (task("regex", pattern=r"\d{4}-\d\d"), " 2026-01 ", 1),
        (task("regex", pattern=r"\d{4}-\d\d"), "2026-01-02", 0),
        (task("regex", reference="a+"), "aaa", 1),
        (task("regex", pattern="a.b"), "a\nb", 1),
    ],
)
def test_regex_matches_the_whole_answer(given: Task, answer: str, expected: float) -> None:
    assert score(given, answer) == expected


def test_a_pattern_that_would_backtrack_for_ever_is_stopped_with_an_error() -> None:
    with pytest.raises(VerifierError, match="timed out"):
        verify(task("regex", pattern=r"(a|aa)+$"), "a" * 60 + "!")


@pytest.mark.parametrize(
    ("args", "answer", "expected"),
    [
        ({"any": ["Paris", "London"]}, "I love PARIS", 1),
        ({"any": ["Paris"]}, "Rome", 0),
        ({"none": ["sorry"]}, "Sorry, no", 0),
        ({"none": ["sorry"]}, "Yes", 1),
        ({"any": ["a"], "none": ["b"]}, "a b", 0),
        ({"min_words": 3}, "one two", 0),
        ({"min_words": 3}, "one two three", 1),
        ({}, "", 0),
        ({}, "anything", 1),
    ],
)
def test_contains_looks_for_words(args: dict[str, Any], answer: str, expected: float) -> None:
    assert score(task("contains", **args), answer) == expected


def test_reasoning_gym_scores_by_the_family_that_made_the_task() -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("gcd", size=1, seed=3)[0]
    for given in (entry, json.dumps(entry)):
        judged = task("reasoning_gym", family="gcd", entry=given)
        assert score(judged, entry["answer"]) == 1
        assert score(judged, "no number") < 0.99


def trajectory(stop: StopReason, *messages: Message) -> Trajectory:
    return Trajectory(task_id="t", generation=0, model="base", messages=list(messages), answer="1", stop_reason=stop)


@pytest.mark.parametrize(
    ("stop", "observation", "expected"),
    [
        (StopReason.ANSWER, "3", 1),
        (StopReason.ANSWER, "error: division by zero", 1),
        (StopReason.MAX_TURNS, "3", 0),
        (StopReason.MALFORMED, "3", 0),
    ],
)
def test_action_judges_whether_a_run_acted_readably_up_to_an_answer(
    stop: StopReason, observation: str, expected: float
) -> None:
    run = trajectory(stop, {"role": "tool", "tool_call_id": "c", "content": observation})
    outcome = judge_trajectory(task("action"), run)
    assert outcome is not None
    assert outcome.score == expected


def test_another_verifier_judges_the_answer_of_a_run() -> None:
    outcome = judge_trajectory(task(reference="1"), trajectory(StopReason.ANSWER))
    assert outcome is not None
    assert outcome.success


@pytest.mark.parametrize(
    "given",
    [
        task("exact"),
        task("numeric"),
        task("numeric", "three"),
        task("regex"),
        task("regex", pattern="("),
        task("regex", pattern=7),
        task("contains", min_words="many"),
        task("reasoning_gym"),
        task("reasoning_gym", family="no_such_family", entry={}),
    ],
)
def test_a_task_its_verifier_cannot_judge_is_a_verifier_error_of_one_line(given: Task) -> None:
    with pytest.raises(VerifierError) as caught:
        verify(given, "3")
    assert "\n" not in str(caught.value)


def test_an_unknown_verifier_is_named_before_anything_runs() -> None:
    for check in (lambda: check_verifier(task("magic")), lambda: verify(task("magic"), "1")):
        with pytest.raises(VerifierError, match=r"'magic'; known: .*exact"):
            check()
    check_verifier(task())
    check_verifier(task("exact", reference="1"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (task("exact"), "reference"),
        (task("exact", "1", case_sensitive=[]), "'exact': argument case_sensitive"),
        (task("numeric", "many"), "'numeric'"),
        (task("numeric", "1", tolerance=-1), "argument tolerance"),
        (task("numeric", "1", tolerance="wide"), "argument tolerance"),
        (task("regex", pattern="("), "'regex'"),
        (task("regex", pattern=7), "argument pattern"),
        (task("contains", any=3), "argument any"),
        (task("contains", any="Paris"), "argument any"),
        (task("contains", any=["0", 5]), "'contains': argument any.1: Input should be a valid string"),
        (task("contains", any=["0"], none=["b", {}]), "argument none.1"),
        (task("contains", any=["Paris"], min_words="many"), "argument min_words"),
        (task("reasoning_gym"), "argument family"),
        (task("reasoning_gym", family="gcd", entry="[1]"), "argument entry"),
        (task("reasoning_gym", family="gcd", entry="no JSON"), "argument entry"),
        (task("reasoning_gym", family="gcd", entry="[" * 100_000), "nested too deeply"),
        (task("reasoning_gym", family="gcd", entry={}), "has an answer"),
        (task("reasoning_gym", family="gcd", entry={"answer": "1"}, config=3), "argument config"),
    ],
)
def test_a_verifier_without_what_it_needs_is_refused_before_anything_runs(given: Task, told: str) -> None:
    for check in (lambda: check_verifier(given), lambda: verify(given, "none of it")):
        with pytest.raises(VerifierError, match=told) as caught:
            check()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        task("contains", any=["Paris"], none=None, min_words=None),
        task("regex", "Paris", pattern=None),
        task("exact", "Paris", case_sensitive=None),
    ],
)
def test_an_argument_that_is_null_counts_as_not_given(given: Task) -> None:
    check_verifier(given)
    assert (score(given, "Paris"), score(given, "Rome")) == (1, 0)


@pytest.fixture
def operators_verifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that offers verifiers by the entry point group."""
    described = tmp_path / "judges_of_an_operator-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: judges-of-an-operator\nVersion: 1.0\n")
    entries = [f"{name} = judges_of_an_operator:{name}" for name in ("short", "generous", "silent", "missing")]
    (described / "entry_points.txt").write_text("[nightschool.verifiers]\n" + "\n".join(entries))
    (tmp_path / "judges_of_an_operator.py").write_text(
        "def short(task, answer, args): return len(answer) <= args['limit']\n"
        "def generous(task, answer, args): return 7\n"
        "def silent(task, answer, args): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("operators_verifiers")
def test_an_operator_adds_verifiers_by_entry_point() -> None:
    check_verifier(task("short"))
    assert score(task("short", limit=3), "abc") == 1
    assert score(task("short", limit=2), "abc") == 0
    assert score(task("generous"), "abc") == 1


@pytest.mark.usefixtures("operators_verifiers")
@pytest.mark.parametrize("name", ["silent", "missing", "short"])
def test_an_operators_verifier_that_fails_is_a_verifier_error_that_names_it(name: str) -> None:
    with pytest.raises(VerifierError, match=name):
        verify(task(name), "abc")
