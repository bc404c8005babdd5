"""Tools of clients: the grammar of their arguments and the check of them agree."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.client_tools import (
    ClientTool,
    arguments_of,
    call_id,
    check_schema,
    pattern,
    run_of_call,
    signature,
    tools_of,
)
from agent.codec import CLIENT, Action, assistant_message, grammar, offered, parse, wire
from memory.errors import ConfigError
from memory.records import new_id

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather\nin a city",
        "parameters": {
            "type": "object",
            "properties": {
                "days": {"type": "integer", "minimum": 1},
                "city": {"type": "string", "minLength": 1},
                "unit": {"enum": ["c", "f (old)"]},
            },
            "required": ["city"],
        },
    },
}
NAMES = offered([], [WEATHER])


def tool(parameters: dict[str, Any], name: str = "act") -> ClientTool:
    return tools_of([{"type": "function", "function": {"name": name, "parameters": parameters}}])[0]


def scalars() -> st.SearchStrategy[dict[str, Any]]:
    enums = st.lists(st.one_of(st.text(max_size=5), st.integers(), st.booleans()), min_size=1, max_size=3)
    kinds = st.sampled_from(["string", "integer", "number", "boolean", "null"])
    return st.one_of(
        kinds.map(lambda kind: {"type": kind}),
        st.lists(kinds, min_size=1, max_size=3, unique=True).map(lambda kinds: {"type": kinds}),
        enums.map(lambda values: {"enum": values}),
        kinds.map(lambda kind: {"anyOf": [{"type": kind}, {"type": "null"}]}),
        kinds.map(lambda kind: {"type": "array", "items": {"type": kind}}),
    )


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any]:
    properties = draw(st.dictionaries(st.text(min_size=1, max_size=6), scalars(), max_size=4))
    if draw(st.booleans()):
        properties["nested"] = {"type": "object", "properties": dict(properties), "required": list(properties)[:1]}
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(st.data(), schemas())
def test_what_the_grammar_accepts_is_a_call_that_fits_the_schema(data: st.DataObject, schema: dict[str, Any]) -> None:
    check_schema(schema)
    made = tool(schema)
    names = [CLIENT + "act"]
    line = data.draw(st.from_regex(grammar(names, 8, client=[made], must_call=True) or "", fullmatch=True))
    action = parse(line, names, [made])
    assert action is not None
    assert action.tool == "act"
    assert json.loads(action.client_arguments or "") == action.arguments
    (back,) = wire([assistant_message(action, "call_1")], names)
    assert parse(back["content"], names, [made]) == action


def test_a_line_is_sent_back_to_the_letter() -> None:
    (weather,) = tools_of([WEATHER])
    line = 'Action: get_weather({"city": "S\\u00e3o \\"Paulo\\"", "days": 3})'
    action = parse(line, NAMES, [weather])
    assert action is not None
    assert action.arguments == {"city": 'São "Paulo"', "days": 3}
    assert wire([assistant_message(action)], NAMES)[0]["content"] == line


@pytest.mark.parametrize(
    "inside",
    ["", "Paris", '{"city": ""}', '{"days": 3}', '{"city": "P", "days": 0}', '{"city": "P", "unit": "k"}', "[1]", "{"],
)
def test_arguments_that_do_not_fit_are_no_action(inside: str) -> None:
    (weather,) = tools_of([WEATHER])
    assert parse(f"Action: get_weather({inside})", NAMES, [weather]) is None


def test_only_the_tools_that_may_be_called_now_are_read_and_offered() -> None:
    (weather,) = tools_of([WEATHER])
    line = 'Action: get_weather({"city": "Paris"})'
    assert parse(line, NAMES, []) is None
    assert re.fullmatch(grammar(NAMES, client=[weather]) or "", line)
    assert re.fullmatch(grammar(NAMES, client=[weather]) or "", "Action: finish(sunny)")
    assert not re.fullmatch(grammar(NAMES) or "", line)
    assert not re.fullmatch(grammar(NAMES, client=[weather], must_call=True) or "", "Action: finish(sunny)")


def test_a_clients_calculator_is_not_ours() -> None:
    theirs = tool({"type": "object", "properties": {"expression": {"type": "string"}}}, "calculator")
    names = [CLIENT + "calculator"]
    line = 'Action: calculator({"expression": "1+2"})'
    action = parse(line, names, [theirs])
    assert action is not None
    assert action == Action("calculator", {"expression": "1+2"}, client_arguments='{"expression": "1+2"}')
    assert wire([assistant_message(action)], names)[0]["content"] == line
    assert parse("Action: calc(1+2)", names, [theirs]) is None


def test_calls_of_tools_that_are_no_longer_offered_are_still_shown() -> None:
    function = {"name": "get_weather", "arguments": '{\n "city": "Paris"\n}'}
    message = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"id": "c", "function": function}]}
    for names in ([], ["calculator"], NAMES):
        said = wire([message], names)[0]["content"]
        assert said == 'Let me look.\nAction: get_weather({"city": "Paris"})'


def test_a_schema_fetches_nothing_and_a_pattern_does_not_run_for_ever() -> None:
    remote = tool({"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1:1/schema.json"}}})
    assert arguments_of(remote, '{"x": 1}') is None
    slow = tool({"type": "object", "properties": {"x": {"type": "string", "pattern": "(a|a)*$"}}})
    assert arguments_of(slow, json.dumps({"x": "a" * 60 + "!"})) is not None


@pytest.mark.parametrize(
    "schema", [{"type": "string"}, {"type": "object", "properties": 3}, {"type": "object", "required": "x"}]
)
def test_what_is_no_schema_of_an_object_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        check_schema(schema)


def test_a_schema_that_says_nothing_takes_any_object_and_a_huge_one_too() -> None:
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}}
    for made in (tool({"type": "object"}), tool(many)):
        assert re.fullmatch(pattern(made), '{"a": {"b": [1, "x"]}, "c": null}')


def test_the_prompt_names_arguments_and_their_kinds() -> None:
    (weather,) = tools_of([WEATHER])
    assert signature(weather) == (
        'get_weather({"days": integer (optional), "city": string, "unit": "c" or "f (old)" (optional)})'
    )
    assert weather.description == "Weather in a city"


def test_a_call_id_names_its_run() -> None:
    run = new_id("traj")
    assert run_of_call(call_id(run, 3)) == run
    assert len(call_id(run, 3)) <= 40
    for other in ("call_abc", "", "toolu_01", "call_a/b_1"):
        assert run_of_call(other) is None
