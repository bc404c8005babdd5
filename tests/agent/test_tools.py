from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent.codec import SHORT_NAMES, Action, assistant_message, parse, wire
from agent.prompts import system_prompt
from agent.tools import TOOLS, call_tool, check_tools
from memory.errors import ConfigError


def called(name: str, arguments: dict[str, Any]) -> str:
    return asyncio.run(call_tool(name, arguments)).text


def test_a_call_returns_what_the_tool_says() -> None:
    assert called("calculator", {"expression": "6*7"}) == "42"
    assert called("python", {"code": "print(6*7)"}) == "42\n"


def test_a_refusal_is_an_observation() -> None:
    assert called("calculator", {"expression": "1/0"}) == "error: division by zero"


@pytest.mark.parametrize("arguments", [{}, {"code": "1"}, {"expression": 1}, {"expression": None}])
def test_a_wrong_argument_is_an_observation_that_names_the_right_one(arguments: dict[str, Any]) -> None:
    assert called("calculator", arguments) == "error: calculator needs the argument 'expression'"


def test_nothing_is_looked_up_outside_of_a_run() -> None:
    assert called("search_knowledge", {"query": "cows"}) == "error: search_knowledge works in a run only"


def test_an_unknown_tool_is_a_config_error_that_names_the_known_ones() -> None:
    assert check_tools(["python", "calculator"]) == ["python", "calculator"]
    with pytest.raises(ConfigError, match="'shell'; known: calculator, python"):
        check_tools(["calculator", "shell"])


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_schema_codec_and_prompt_agree_about_every_tool(name: str) -> None:
    tool = TOOLS[name]
    function = tool.schema["function"]
    assert function["name"] == tool.name == name
    assert function["parameters"]["required"] == [tool.argument]
    call = Action(name, {tool.argument: "x"})
    line = wire([assistant_message(call)], [name])[0]["content"]
    assert parse(line, [name]) == call
    assert f"Action: {SHORT_NAMES[name][0]}(" in (system_prompt([name], None) or "")
