from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.codec import Action, assistant_message, grammar, parse, wire
from memory.records import MALFORMED, RECALLED, Message

TOOLS = ["calculator", "python", "search_experience"]
ARGUMENTS = {"calculator": "expression", "python": "code", "search_experience": "query", "weather": "input"}

said = st.one_of(st.text(), st.text(alphabet="ab\\n\n\r\t() \"'{}:"), st.from_regex(r"(\\n|\\\\|\n|\)|Action: )*"))
"""What can stand in an argument or an answer, with plenty of what could be mistaken for the line's own form."""

spoken = said.filter(str.strip)


@given(st.sampled_from(sorted(ARGUMENTS)), spoken)
def test_a_tool_call_comes_back_from_its_line_as_it_was(tool: str, text: str) -> None:
    call = Action(tool=tool, arguments={ARGUMENTS[tool]: text})
    (line,) = wire([assistant_message(call)], list(ARGUMENTS))
    assert parse(line["content"], list(ARGUMENTS)) == call
    assert parse(line["content"], [tool]) == call


@given(spoken)
def test_an_answer_comes_back_from_its_line_as_it_was(text: str) -> None:
    answer = Action(tool=None, arguments={}, answer=text)
    (line,) = wire([assistant_message(answer)], TOOLS)
    assert parse(line["content"], TOOLS) == answer
    assert parse(line["content"], ["calculator"]) == answer


@given(spoken)
def test_the_grammar_accepts_any_argument_of_a_free_tool_that_fits_its_length(text: str) -> None:
    (line,) = wire([assistant_message(Action("python", {"code": text}))], TOOLS)
    inside = line["content"].split("(", 1)[1][:-1]
    for limit in (max(1, len(inside) - 1), len(inside), len(inside) + 1):
        accepted = re.fullmatch(grammar(TOOLS, limit) or "", line["content"]) is not None
        assert accepted == (len(inside) <= limit)


@pytest.mark.parametrize(
    "line",
    [
        "Action: calc(694 - 909 - 211)",
        "Action: calc(-5 * (3 + 4) / 2.5)",
        "Action: calc(gcd(12, 18))",
        "Action: calc(lcm(lcm(4, 6), 10))",
        'Action: calc(count("r", "strawberry and more"))',
        "Action: calc(solve(3*x + 4 = 10))",
        "Action: calc(3*x + 4 = 10)",
        "Action: finish(72 apples (or so))",
        "Action: search_knowledge(how long is the guarantee (in years)?)",
        "Action: search_experience(adding up three numbers)",
    ],
)
def test_the_grammar_accepts_what_the_tools_understand(line: str) -> None:
    assert re.fullmatch(grammar(["calculator", "search_knowledge", "search_experience"]) or "", line)


@pytest.mark.parametrize(
    "line",
    [
        "Action: calc(1 + 2) = 3, so it is 3)",
        "Action: calc(expression)",
        "Action: calc(the numbers of the question)",
        "Action: finish(3) and more)",
        "Action: search_knowledge(guarantee) and then I)",
    ],
)
def test_the_grammar_ends_a_line_where_its_call_closes_and_keeps_prose_out_of_a_calculation(line: str) -> None:
    assert not re.fullmatch(grammar(["calculator", "search_knowledge"]) or "", line)


def test_where_an_answer_is_due_the_grammar_leaves_no_tool() -> None:
    due = grammar(["calculator"], answer_only=True) or ""
    assert re.fullmatch(due, "Action: finish(3)")
    assert not re.fullmatch(due, "Action: calc(3)")


@given(st.data(), st.sampled_from([["calculator"], ["python"], TOOLS]))
def test_what_the_grammar_accepts_is_read_and_sent_back_as_one_action(data: st.DataObject, tools: list[str]) -> None:
    line = data.draw(st.from_regex(grammar(tools, 40) or "", fullmatch=True))
    action = parse(line, tools)
    if action is None:
        assert not line.split("(", 1)[1][:-1].strip(), "only a blank argument is accepted and not read"
        return
    assert action.tool is None or action.tool in tools
    (back,) = wire([assistant_message(action)], tools)
    assert parse(back["content"], tools) == action
    if "\\" not in line:
        assert back["content"] == line, "training must render to the very text that was served"


def test_the_grammar_offers_only_the_tools_of_the_task() -> None:
    calculator = grammar(["calculator"]) or ""
    assert re.fullmatch(calculator, "Action: calc(1+2)")
    assert re.fullmatch(calculator, "Action: finish(3)")
    for line in (
        "Action: python(1)",
        "Action: calculator(1)",
        "Action: calc()",
        "Action: calc(1)\n",
        "action: calc(1)",
        "Action: calc(1\n2)",
        "Well. Action: calc(1)",
    ):
        assert not re.fullmatch(calculator, line), line


def test_without_tools_nothing_is_constrained() -> None:
    assert grammar([]) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "3",
        "The answer is 3.",
        "Action:",
        "Action: calc",
        "Action: calc(1+2",
        "Action: calc()",
        "Action: calc(   )",
        "Action: finish()",
        "Action: python(1)",
        "Action: calculator(1)",
        "Action: rm(1)",
        "Action: calc(1) or so",
        "Action calc(1)",
        "Let me see.\nAction: calc(1)",
        'Action: {"name": "calc"}',
        "Observation: 3",
    ],
)
def test_a_malformed_line_is_no_action(text: str) -> None:
    assert parse(text, ["calculator"]) is None


@given(st.text())
def test_no_text_makes_the_parser_fail(text: str) -> None:
    assert parse(text, TOOLS) is None or text.strip().startswith("Action:")


def test_what_follows_the_first_line_is_not_read_unless_it_may_be_code() -> None:
    assert parse("Action: calc(1)\nObservation: 1", ["calculator"]) == Action("calculator", {"expression": "1"})
    assert parse("Action: python(x = 1\nx)", ["python"]) == Action("python", {"code": "x = 1\nx"})


def test_plain_chat_passes_unchanged() -> None:
    chat: list[Message] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Action: finish(1)\n\\n"},
        {"role": "assistant", "content": "Observation: (2)\n"},
        {"role": "user", "content": "hello", "name": RECALLED},
    ]
    assert wire(chat, []) == chat


def test_a_run_is_rendered_line_by_line() -> None:
    call = assistant_message(Action("calculator", {"expression": "1+2"}))
    messages: list[Message] = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "1+2"}, {"type": "text", "text": "?"}], "name": RECALLED},
        {**call, "name": RECALLED},
        {"role": "tool", "tool_call_id": "c", "content": "3", "name": RECALLED},
        {"role": "assistant", "content": "hm", "name": MALFORMED},
        {"role": "assistant", "content": "3"},
    ]
    assert wire(messages, ["calculator"]) == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "1+2?", "name": RECALLED},
        {"role": "assistant", "content": "Action: calc(1+2)", "name": RECALLED},
        {"role": "user", "content": "Observation: 3", "name": RECALLED},
        {"role": "assistant", "content": "hm", "name": MALFORMED},
        {"role": "assistant", "content": "Action: finish(3)"},
    ]


def message() -> st.SearchStrategy[Message]:
    def call(tool: str, text: str) -> Message:
        return assistant_message(Action(tool, {ARGUMENTS[tool]: text}))

    plain = st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        said,
    )
    calls = st.builds(call, st.sampled_from(TOOLS), said)
    marked = st.sampled_from([{}, {"name": RECALLED}, {"name": MALFORMED}])
    return st.builds(lambda m, mark: {**m, **mark}, st.one_of(plain, calls), marked)


@given(st.lists(message(), max_size=8), st.sampled_from([[], ["calculator"], TOOLS]))
def test_the_number_the_order_and_the_marks_of_messages_are_kept(messages: list[Message], tools: list[str]) -> None:
    sent = wire(messages, tools)
    assert [m.get("name") for m in sent] == [m.get("name") for m in messages]
    roles: dict[Any, Any] = {"tool": "user"}
    assert [m["role"] for m in sent] == [roles.get(m["role"], m["role"]) for m in messages]
    assert all(isinstance(m["content"], str) for m in sent)


def test_arguments_of_another_shape_are_shown_as_they_are() -> None:
    function = {"name": "calculator", "arguments": json.dumps({"a": 1, "b": [2]})}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }
    assert wire([message], ["calculator"])[0]["content"] == 'Action: calc({"a": 1, "b": [2]})'
