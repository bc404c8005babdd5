"""Uploaded training files: what of OpenAI's two formats becomes an example, and what is refused by line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.prompts import compose
from distill.dataset import DatasetConfig, build_uploaded
from distill.snapshot import Snapshot
from distill.uploads import Method, read_upload
from memory.errors import ConfigError, NotEnoughExperienceError
from memory.recall import NoMemory
from memory.records import Example, ExampleKind, Task

TOOLS = ["calculator"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def supervised(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [user(question), says(answer)], **more}


def preference(question: str, better: str, worse: str) -> dict[str, Any]:
    sides = {"preferred_output": [says(better)], "non_preferred_output": [says(worse)]}
    return {"input": {"messages": [user(question)]}, **sides}


def read(*lines: dict[str, Any] | str, method: Method = "supervised") -> list[tuple[Task, Example]]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return list(read_upload(texts, method, file_id="file-1", tenant="acme", tools=TOOLS))


def test_a_supervised_line_teaches_what_follows_its_last_user_message():
    earlier = [{"role": "system", "content": "Be brief."}, user("Hi"), says("Hello")]
    [(task, example)] = read({"messages": [*earlier, user("2+2?"), says("4")]})
    assert task.messages == [*earlier, user("2+2?")]
    assert example.kind is ExampleKind.SFT
    assert example.messages == [user("Hi"), says("Hello"), user("2+2?"), says("4")]
    assert (task.tenant, example.tenant, example.tools, example.sources) == ("acme", "acme", TOOLS, ["file-1"])


def test_a_line_may_show_tool_calls():
    call = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2+2"}'}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
        says("4"),
    ]
    [(_, example)] = read({"messages": [user("2+2?"), *turns]})
    assert example.messages[1:] == turns


def test_calls_of_a_line_are_taken_as_they_are_served_one_a_turn():
    def call(id: str, expression: str) -> dict[str, Any]:
        arguments = json.dumps({"expression": expression})
        return {"id": id, "type": "function", "function": {"name": "calculator", "arguments": arguments}}

    def turn(content: str | None, *calls: dict[str, Any]) -> dict[str, Any]:
        return {"role": "assistant", "content": content, "tool_calls": list(calls)}

    one, two = ({"role": "tool", "tool_call_id": id, "content": said} for id, said in (("a", "4"), ("b", "6")))
    beside = turn("Both at once.", call("a", "2+2"), call("b", "3+3"))
    [(_, example)] = read({"messages": [user("2+2 and 3+3?"), beside, one, two, says("4 and 6")]})
    apart = [turn(None, call("a", "2+2")), one, turn(None, call("b", "3+3")), two]
    assert example.messages[1:] == [*apart, says("4 and 6")]


def test_a_preference_line_is_a_pair():
    [(_, example)] = read(preference("2+2?", "4", "5"), method="dpo")
    assert example.kind is ExampleKind.DPO
    assert (example.chosen, example.rejected) == ([says("4")], [says("5")])


def test_reading_a_file_again_gives_the_same_ids():
    once, again = read(supervised("2+2?", "4")), read(supervised("2+2?", "4"))
    assert once[0][0].id == again[0][0].id
    assert once[0][1].id == again[0][1].id


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 of the training file: no JSON"),
        ("[]", "line 2"),
        ({"messages": [user("only a question")]}, "messages"),
        ({"messages": [user("2+2?"), user("3+3?")]}, "the last message is not the assistant's answer"),
        ({"messages": [says("4"), says("5")]}, "there is no user message"),
        ({"messages": [user("2+2?"), says("")]}, "empty"),
        ({"messages": [user("2+2?"), says("Well."), says("4")]}, "nothing may follow"),
        ({"messages": [user("2+2?"), {"role": "wizard", "content": "4"}]}, "wizard"),
        ({"messages": [user("2+2?"), {**says("4"), "weight": 0}]}, "weight"),
        (supervised("2+2?", "4", tools=[]), "tools: this field is not supported"),
        (supervised("2+2?", "4", nightschool={"tools": ["shell"]}), "unknown tool 'shell'"),
        (preference("2+2?", "4", "5"), "messages"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(line: Any, said: str):
    with pytest.raises(ConfigError, match="line 2 of the training file") as refused:
        read(supervised("1+1?", "2"), line)
    assert said in str(refused.value)


def test_an_uploaded_file_becomes_a_dataset_without_held_out_tasks_and_duplicates():
    lines = [supervised(f"What is {n} + {n}?", str(2 * n)) for n in range(10)]
    pairs = read(*lines, lines[3])
    held_out = [pairs[0][0]]
    material = Snapshot([], [], {task.id: task for task, _ in pairs}, held_out_tasks=held_out)
    config = DatasetConfig(min_examples=2)
    dataset = build_uploaded(material, (example for _, example in pairs), NoMemory(), compose, config)
    questions = {example.messages[1]["content"] for example in dataset.examples}
    assert "What is 0 + 0?" not in questions
    assert dataset.counts["file"] == len(dataset.examples) <= 9
    assert dataset.dropped["duplicate"] == 1
    with pytest.raises(NotEnoughExperienceError):
        build_uploaded(material, [], NoMemory(), compose, config)
