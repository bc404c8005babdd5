"""The seam to the model: the fake and the real one keep one contract; the real one over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from agent.engine_client import EngineClient
from agent.llm import ChatModel, ChatReply, ChatRequest, LiteLLMModel, LLMConfig, ScriptedModel
from memory.errors import ContextLengthError, EngineError, ModelError, ModelUnavailableError
from tests.agent.fake_engine import CONTEXT_LENGTH, FakeEngine, Refuses, Says

REQUEST = ChatRequest(
    model="gen-1@0123456789ab",
    messages=[{"role": "system", "content": "rules"}, {"role": "user", "content": "hi", "name": "recalled"}],
    sampling={"temperature": 0.0, "max_tokens": 9, "seed": 7, "stop": ["\n"]},
    regex=r"Action: (calc|finish)\([^\n]{1,60}\)",
    cache_salt="tenant-a",
)
PATIENCE = LLMConfig(timeout_s=20, attempts=3, backoff_s=0)


At = Callable[[FakeEngine], ChatModel]


@pytest.fixture(params=[LiteLLMModel, EngineClient])
def model_at(request: pytest.FixtureRequest) -> At:
    """Makes a model of either kind at an engine."""
    return lambda engine: request.param(engine, PATIENCE)


def complete(model: ChatModel, request: ChatRequest = REQUEST) -> ChatReply:
    return asyncio.run(model.complete(request))


def streamed(model: ChatModel, request: ChatRequest = REQUEST) -> list[str | ChatReply]:
    """What a reader of the stream gets."""
    return asyncio.run(read(model, request, []))


async def read(model: ChatModel, request: ChatRequest, got: list[str | ChatReply]) -> list[str | ChatReply]:
    async for item in model.stream(request):
        got.append(item)
    return got


@pytest.fixture(params=["scripted", LiteLLMModel, EngineClient])
def talker(request: pytest.FixtureRequest) -> Iterator[Callable[..., ChatModel]]:
    """Makes a model of either kind that says a text, or fails with a ModelError."""
    with ExitStack() as stack:

        def make(text: str | None) -> ChatModel:
            if request.param == "scripted":
                return ScriptedModel([ModelError("no") if text is None else text])
            says = Refuses(400) if text is None else Says(pieces=[word + " " for word in text.split()] or [text])
            return request.param(stack.enter_context(FakeEngine([says])), PATIENCE)

        yield make


def test_a_reply_carries_its_text_and_its_numbers(talker: Callable[..., ChatModel]) -> None:
    reply = complete(talker("Action: finish(3)"))
    assert reply.text.strip() == "Action: finish(3)"
    assert reply.finish_reason == "stop"
    assert (reply.prompt_tokens or 0) > 0
    assert (reply.completion_tokens or 0) > 0
    assert reply.seconds >= 0


def test_the_pieces_of_a_stream_make_up_the_reply_that_ends_it(talker: Callable[..., ChatModel]) -> None:
    *pieces, last = streamed(talker("one two three"))
    assert isinstance(last, ChatReply)
    assert all(isinstance(piece, str) for piece in pieces)
    assert len(pieces) == 3
    assert "".join(str(piece) for piece in pieces) == last.text
    assert last.text.split() == ["one", "two", "three"]
    assert last.finish_reason == "stop"


def test_an_empty_reply_is_a_reply(talker: Callable[..., ChatModel]) -> None:
    assert complete(talker("")).text == ""


def test_a_refused_call_raises_a_model_error_whole_and_streamed(talker: Callable[..., ChatModel]) -> None:
    for call in (complete, streamed):
        with pytest.raises(ModelError) as caught:
            call(talker(None))
        assert "\n" not in str(caught.value)


def test_the_scripted_model_answers_by_a_function_and_remembers_what_it_was_asked() -> None:
    model = ScriptedModel(lambda request: request.messages[-1]["content"].upper())
    assert complete(model).text == "HI"
    assert model.requests == [REQUEST]


def test_token_ids_and_log_probability_come_through(model_at: At) -> None:
    with FakeEngine([Says(prompt_token_ids=(1, 2, 3), token_ids=(4, 5), logprobs=(-0.5, -0.25))]) as engine:
        reply = complete(model_at(engine))
    assert (reply.prompt_token_ids, reply.token_ids) == ([1, 2, 3], [4, 5])
    assert reply.logprob == pytest.approx(-0.75)
    assert (reply.prompt_tokens, reply.completion_tokens) == (3, 2)


def test_without_log_probabilities_there_is_none_instead_of_zero(model_at: At) -> None:
    with FakeEngine([Says(logprobs=())]) as engine:
        assert complete(model_at(engine)).logprob is None


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_gets_every_field_at_the_top_of_the_body(model_at: At, stream: bool) -> None:
    with FakeEngine() as engine:
        (streamed if stream else complete)(model_at(engine))
    (body,) = engine.requests
    assert body["model"] == REQUEST.model
    assert body["messages"] == REQUEST.messages
    assert body["structured_outputs"] == {"regex": REQUEST.regex}
    assert body["return_token_ids"] is True
    assert body["cache_salt"] == "tenant-a"
    assert {name: body[name] for name in REQUEST.sampling} == REQUEST.sampling
    assert body.get("stream", False) is stream
    assert body.get("stream_options") == ({"include_usage": True} if stream else None)
    assert "extra_body" not in body
    assert engine.headers[0]["authorization"] == "Bearer secret-key"


def test_an_unconstrained_call_names_no_grammar_and_no_salt(model_at: At) -> None:
    with FakeEngine() as engine:
        complete(model_at(engine), ChatRequest(model="base", messages=REQUEST.messages))
    assert not {"structured_outputs", "cache_salt"} & set(engine.requests[0])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_failing_engine_is_tried_again_until_it_answers(model_at: At, status: int, stream: bool) -> None:
    with FakeEngine([Refuses(status), Refuses(status), Says(["back"])]) as engine:
        reply = streamed(model_at(engine))[-1] if stream else complete(model_at(engine))
    assert isinstance(reply, ChatReply)
    assert reply.text == "back"
    assert len(engine.requests) == engine.asked_ready == 3


@pytest.mark.parametrize("call", [complete, streamed])
def test_an_engine_that_keeps_failing_is_unavailable_after_the_last_try(model_at: At, call: Callable[..., Any]) -> None:
    with FakeEngine([Refuses(500)]) as engine, pytest.raises(ModelUnavailableError) as caught:
        call(model_at(engine))
    assert len(engine.requests) == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [complete, streamed])
def test_a_refused_connection_is_tried_again_then_unavailable(model_at: At, call: Callable[..., Any]) -> None:
    with FakeEngine() as engine:
        pass
    with pytest.raises(ModelUnavailableError):
        call(model_at(engine))
    assert engine.asked_ready == 3


def test_an_engine_that_does_not_get_ready_is_unavailable(model_at: At) -> None:
    class Dead(FakeEngine):
        async def wait_ready(self, timeout: float) -> None:
            self.asked_ready += 1
            raise EngineError("the engine is gone; see its log")

    engine = Dead()
    with pytest.raises(ModelUnavailableError, match="the engine is gone"):
        complete(model_at(engine))
    assert engine.asked_ready == 3


@pytest.mark.parametrize("call", [complete, streamed])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_wrong_request_is_not_tried_again(model_at: At, status: int, call: Callable[..., Any]) -> None:
    with (
        FakeEngine([Refuses(status, "bad grammar")]) as engine,
        pytest.raises(ModelError, match="bad grammar") as caught,
    ):
        call(model_at(engine))
    assert len(engine.requests) == 1
    assert not isinstance(caught.value, ModelUnavailableError | ContextLengthError)


@pytest.mark.parametrize("call", [complete, streamed])
def test_a_prompt_that_is_too_long_is_named_as_such_and_not_tried_again(model_at: At, call: Callable[..., Any]) -> None:
    with FakeEngine([Refuses(400, CONTEXT_LENGTH)]) as engine, pytest.raises(ContextLengthError):
        call(model_at(engine))
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": []},
        {"error": {"message": "EngineCore died", "code": 500}},
        {},
    ],
)
def test_a_reply_without_a_choice_is_an_error(model_at: At, body: dict[str, Any]) -> None:
    with FakeEngine([Refuses(200, body=body)]) as engine, pytest.raises(ModelError):
        complete(model_at(engine))


@pytest.mark.parametrize(
    "broken",
    [
        Says(["hel"], in_band_error="EngineCore died"),
        Says([], in_band_error="EngineCore died"),
        Says([], in_band_error="EngineCore died", done=False),
        Says(["hel"], finish=None, done=False),
        Says([], finish=None, done=False),
        Says(["hel"], hang_up=True),
        Says([], hang_up=True),
    ],
)
def test_a_stream_that_breaks_off_raises_and_never_ends_as_a_success(model_at: At, broken: Says) -> None:
    got: list[str | ChatReply] = []
    with FakeEngine([broken]) as engine, pytest.raises(ModelError):
        asyncio.run(read(model_at(engine), REQUEST, got))
    assert got == list(broken.pieces)


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("with_text", [False, True])
def test_a_stream_ends_with_the_engines_own_usage_and_finish_reason(model_at: At, finish: str, with_text: bool) -> None:
    says = Says(
        ["hel", "lo"], finish=finish, finish_with_text=with_text, prompt_token_ids=range(70), token_ids=range(9)
    )
    with FakeEngine([says]) as engine:
        last = streamed(model_at(engine))[-1]
    assert isinstance(last, ChatReply)
    assert (last.text, last.finish_reason) == ("hello", finish)
    assert (last.prompt_tokens, last.completion_tokens) == (70, 9)


def test_a_cancelled_call_is_cancelled_and_not_an_error(model_at: At) -> None:
    class NeverReady(FakeEngine):
        async def wait_ready(self, timeout: float) -> None:
            await asyncio.Event().wait()

    async def cancel() -> None:
        running = asyncio.create_task(model_at(NeverReady()).complete(REQUEST))
        await asyncio.sleep(0.05)
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
