from __future__ import annotations

import json

import pytest
import reasoning_gym

from agent.calculator import calculate
from agent.codec import parse, wire
from evals.oracle import ORACLE_FAMILIES, oracle, oracle_expression
from evals.suites import TRAINED_FAMILIES, UNTRAINED_FAMILIES, reasoning_gym_tasks
from memory.errors import VerifierError
from memory.records import Task

FAMILIES = {**TRAINED_FAMILIES, "basic_arithmetic": UNTRAINED_FAMILIES["basic_arithmetic"]}


@pytest.mark.parametrize("family", sorted(ORACLE_FAMILIES))
def test_the_oracle_is_right_by_reasoning_gyms_own_scorer(family: str) -> None:
    config = FAMILIES[family]
    dataset = reasoning_gym.create_dataset(family, size=1, seed=0, **config)
    for task in reasoning_gym_tasks({family: config}, 12, seed=303):
        assert task.verifier is not None
        messages = oracle(task, calculate)
        assert dataset.score_answer(messages[-1]["content"], task.verifier.args["entry"]) >= 0.99
        assert messages[1]["content"] == calculate(oracle_expression(task))


def test_a_correction_survives_the_models_compact_form() -> None:
    for task in reasoning_gym_tasks(TRAINED_FAMILIES, 4, seed=304):
        call, _, answer = oracle(task, calculate)
        lines = [m["content"] for m in wire([call, answer], ["calculator"])]
        acted, finished = parse(lines[0], ["calculator"]), parse(lines[1], ["calculator"])
        assert acted is not None
        assert finished is not None
        assert acted.arguments == json.loads(call["tool_calls"][0]["function"]["arguments"])
        assert finished.answer == task.reference


def test_more_than_two_numbers_are_nested() -> None:
    task = reasoning_gym_tasks({"gcd": {"min_numbers": 3, "max_numbers": 3}}, 1, seed=1)[0]
    expression = oracle_expression(task)
    assert expression.count("gcd(") == 2
    assert calculate(expression) == task.reference


def test_a_calculator_that_disagrees_with_the_reference_makes_no_correction() -> None:
    task = reasoning_gym_tasks({"gcd": {}}, 1, seed=1)[0]
    with pytest.raises(VerifierError, match="the reference is"):
        oracle(task, lambda _: "-7")


def test_a_family_the_oracle_does_not_know_is_refused() -> None:
    other = Task(messages=[{"role": "user", "content": "Hello"}])
    with pytest.raises(VerifierError, match="the oracle knows"):
        oracle(other, calculate)
