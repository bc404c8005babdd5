"""The one way to a model: `ChatModel`, LiteLLM behind it, and the scripted model of the tests.

Owns retries (here and nowhere else) and the kinds of errors. Knows nothing of tools, memory or
generations: it is handed the engine's model name and plain messages. Our own engine is called by
`agent.engine_client`, every other provider by LiteLLM.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from memory.errors import ContextLengthError, ModelError, ModelUnavailableError
from memory.records import Message

T = TypeVar("T")

WORTH_RETRYING = frozenset({408, 409, 425, 429})
"""The statuses between 400 and 499 that may pass; the others say that the request is wrong."""


class LLMConfig(BaseModel):
    """How patient the seam is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout_s: float = Field(default=300.0, gt=0, description="one model call, queueing included")
    attempts: int = Field(default=6, ge=1, description="tries of one call while the engine is unreachable")
    backoff_s: float = Field(default=1.0, ge=0, description="wait before the second try; doubles up to 30 s")


@dataclass(frozen=True)
class ChatRequest:
    """One call. `sampling`: OpenAI's fields (temperature, max_tokens, …). `regex` constrains the reply."""

    model: str
    messages: list[Message]
    sampling: dict[str, Any] = field(default_factory=dict)
    regex: str | None = None
    cache_salt: str | None = None
    """Keeps one tenant's prefix-cache timing from another's (vLLM's `cache_salt`)."""


@dataclass(frozen=True)
class ChatReply:
    """What came back. None = the engine did not say."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprob: float | None = None
    """Sum over the completion's tokens."""
    logprobs: list[dict[str, Any]] | None = None
    """OpenAI's entry for each token of the completion, where the sampling asked for them."""
    seconds: float = 0.0
    cost_usd: float | None = None
    """What a provider takes for it, where LiteLLM knows the price."""


class ChatModel(Protocol):
    """The seam: anything that answers a ChatRequest."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        """The whole reply. ModelError when there is none after all retries."""
        ...

    def stream(self, request: ChatRequest) -> AsyncIterator[str | ChatReply]:
        """Pieces of text as they come, then the whole ChatReply. Not retried once a piece is out."""
        ...


class Endpoint(Protocol):
    """Where the model lives now; asked at every call, since an engine that restarts may move."""

    async def wait_ready(self, timeout: float) -> None:
        """Return once the model can be called; raise EngineError when it cannot in `timeout` seconds."""
        ...

    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str: ...


class LiteLLMModel:
    """A model behind LiteLLM: the engine by default, any other provider by its LiteLLM name."""

    def __init__(
        self, endpoint: Endpoint | None, config: LLMConfig | None = None, arguments: dict[str, Any] | None = None
    ) -> None:
        """`arguments`: what LiteLLM needs with every call to another provider (`api_base`, `api_key`, …)."""
        self._endpoint = endpoint
        self._config = config or LLMConfig()
        self._arguments = arguments or {}

    async def warm(self) -> None:
        """Import LiteLLM, so that no call waits for that."""
        await asyncio.to_thread(_litellm)

    async def complete(self, request: ChatRequest) -> ChatReply:
        started = time.monotonic()
        response = await retrying(self._config, lambda: self._call(request, stream=False), _translate)
        if not response.choices:
            raise ModelError("the engine's reply holds no choice; look into its log")
        choice = response.choices[0]
        extra = _extra(choice)
        usage = getattr(response, "usage", None)
        return ChatReply(
            text=choice.message.content or "",
            finish_reason=choice.finish_reason,
            prompt_tokens=getattr(usage, "prompt_tokens", None),
            completion_tokens=getattr(usage, "completion_tokens", None),
            prompt_token_ids=_extra(response).get("prompt_token_ids"),
            token_ids=extra.get("token_ids"),
            logprob=_logprob(choice),
            seconds=time.monotonic() - started,
            cost_usd=None if self._endpoint else _cost(response, request.model),
        )

    async def stream(self, request: ChatRequest) -> AsyncIterator[str | ChatReply]:
        started = time.monotonic()
        chunks = await retrying(self._config, lambda: self._call(request, stream=True), _translate)
        text, finish, usage = "", None, None
        try:
            async for chunk in chunks:
                usage = getattr(chunk, "usage", None) or usage
                if not chunk.choices:
                    continue
                finish = chunk.choices[0].finish_reason or finish
                piece = chunk.choices[0].delta.content or ""
                if piece:
                    text += piece
                    yield piece
        except Exception as exc:
            raise _translate(exc) from exc
        if getattr(chunks, "received_finish_reason", None) is None:
            # LiteLLM makes up a "stop" when a stream just ends; only this attribute of its wrapper has what
            # the engine said. Without it the stream was cut, and saying nothing would make it a success.
            raise ModelError("the engine's stream broke off before the reply was finished; try again")
        yield ChatReply(
            text=text,
            finish_reason=finish,
            prompt_tokens=getattr(usage, "prompt_tokens", None),
            completion_tokens=getattr(usage, "completion_tokens", None),
            seconds=time.monotonic() - started,
        )

    async def _call(self, request: ChatRequest, *, stream: bool) -> Any:
        litellm = await asyncio.to_thread(_litellm)
        arguments: dict[str, Any] = {**self._arguments, **request.sampling}
        model = request.model
        if self._endpoint is not None:
            await self._endpoint.wait_ready(self._config.timeout_s)
            body: dict[str, Any] = {"return_token_ids": True}
            if request.regex is not None:
                body["structured_outputs"] = {"regex": request.regex}
            if request.cache_salt is not None:
                body["cache_salt"] = request.cache_salt
            model = f"hosted_vllm/{request.model}"
            arguments |= {"api_base": self._endpoint.base_url, "api_key": self._endpoint.api_key, "extra_body": body}
        if stream:
            arguments["stream_options"] = {"include_usage": True}
        return await litellm.acompletion(
            model=model,
            messages=request.messages,
            stream=stream,
            timeout=self._config.timeout_s,
            num_retries=0,
            max_retries=0,
            **arguments,
        )


async def retrying(
    config: LLMConfig, call: Callable[[], Awaitable[T]], translate: Callable[[Exception], ModelError]
) -> T:
    """What `call` returns, tried again while the model is away or too busy; its last error, translated."""
    wait = config.backoff_s
    for attempt in range(1, config.attempts + 1):
        try:
            return await call()
        except Exception as exc:
            error = translate(exc)
            if attempt == config.attempts or not isinstance(error, ModelUnavailableError):
                raise error from exc
            await asyncio.sleep(wait)
            wait = min(wait * 2, 30.0)
    raise AssertionError("unreachable")


def failure(status: int | None, said: str) -> ModelError:
    """A failed call as our error: a wrong request, or (also without a status) a model that is away or too busy."""
    message = said.split("\n")[0][:500]
    if "maximum context length" in message:
        return ContextLengthError(f"the prompt does not fit the model's context: {message}")
    if status is not None and 400 <= status < 500 and status not in WORTH_RETRYING:
        return ModelError(f"the model refused the call: {message}")
    return ModelUnavailableError(f"the model cannot be reached: {message}")


def _litellm() -> Any:
    """LiteLLM; its import takes ten seconds of processor time, so call this off the event loop."""
    # Without it, the import fetches a price list from the network.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    litellm.suppress_debug_info = True
    return litellm


def _translate(exc: Exception) -> ModelError:
    """LiteLLM's error as ours: a wrong request, or a model that is away or too busy."""
    from litellm import exceptions

    if isinstance(exc, ModelError):
        return exc
    if isinstance(exc, exceptions.ContextWindowExceededError):
        return ContextLengthError(f"the prompt does not fit the model's context: {str(exc).splitlines()[0][:500]}")
    status = getattr(exc, "status_code", None)
    return failure(status if isinstance(status, int) else None, str(exc))


def _extra(part: Any) -> dict[str, Any]:
    """Fields beyond OpenAI's: LiteLLM keeps them as attributes or under provider_specific_fields."""
    known = dict(getattr(part, "provider_specific_fields", None) or {})
    for name in ("token_ids", "prompt_token_ids"):
        value = getattr(part, name, None)
        if value is not None:
            known[name] = value
    return known


def _cost(response: Any, model: str) -> float | None:
    """In dollars by LiteLLM's own price list; None for a model that is not in it."""
    try:
        return float(_litellm().completion_cost(completion_response=response, model=model))
    except Exception:
        # It raises a bare Exception for a model that it has no price of.
        return None


def _logprob(choice: Any) -> float | None:
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    return sum(token.logprob for token in content) if content else None


@dataclass
class ScriptedModel:
    """A model that says what it was told to say: the fake at this seam, for fast tests.

    `script`: replies in turn, or a function of the request. An exception in the script is raised.
    """

    script: Sequence[str | Exception] | Callable[[ChatRequest], str | Exception]
    requests: list[ChatRequest] = field(default_factory=list)

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.requests.append(request)
        reply = self.script(request) if callable(self.script) else self.script[len(self.requests) - 1]
        if isinstance(reply, Exception):
            raise reply
        words = len(reply.split())
        return ChatReply(text=reply, finish_reason="stop", prompt_tokens=1, completion_tokens=words)

    async def stream(self, request: ChatRequest) -> AsyncIterator[str | ChatReply]:
        reply = await self.complete(request)
        for piece in re.split(r"(?<= )", reply.text):
            yield piece
        yield reply
