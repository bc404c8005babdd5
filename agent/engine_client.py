"""Our own engine, called directly: OpenAI's protocol with vLLM's additions, over aiohttp.

Why not LiteLLM here: its stream wrapper makes up a "stop" where the engine broke off, drops token ids
(`tests/agent/test_engine_client.py` shows both) and costs milliseconds of processor time per call.
Owns the bytes on the wire; retries and the kinds of errors are `agent.llm`'s.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from agent.llm import ChatReply, ChatRequest, Endpoint, LLMConfig, failure, retrying
from memory.errors import ModelError

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession


class EngineClient:
    """A `ChatModel` at an `Endpoint`. Connections are kept between calls, until `close`.

    A cancelled `complete` and a closed `stream` close their connection, by which vLLM stops the work.
    """

    def __init__(self, endpoint: Endpoint, config: LLMConfig | None = None) -> None:
        self._endpoint = endpoint
        self._config = config or LLMConfig()
        self._session: ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def complete(self, request: ChatRequest) -> ChatReply:
        started = time.monotonic()
        reply = await retrying(self._config, lambda: self._whole(request), translate)
        said = _Reading()
        said.take(reply, "message")
        if not said.choices:
            raise ModelError("the engine's reply holds no choice; look into its log")
        return said.reply(started)

    async def stream(self, request: ChatRequest) -> AsyncIterator[str | ChatReply]:
        started = time.monotonic()
        response = await retrying(self._config, lambda: self._open(request, stream=True), translate)
        said = _Reading()
        try:
            async for event in _events(response):
                piece = said.take(event, "delta")
                if piece:
                    yield piece
        except Exception as exc:
            raise translate(exc) from exc
        finally:
            # Not handed back to the pool: an unread rest would keep the engine generating.
            response.close()
        if said.finish_reason is None:
            raise ModelError("the engine's stream broke off before the reply was finished; try again")
        yield said.reply(started)

    async def close(self) -> None:
        """Close the kept connections."""
        if self._session is not None:
            await self._session.close()

    async def _whole(self, request: ChatRequest) -> dict[str, Any]:
        response = await self._open(request, stream=False)
        try:
            return _checked(json.loads(await response.read()))
        finally:
            response.release()

    async def _open(self, request: ChatRequest, *, stream: bool) -> ClientResponse:
        """The answer's head, with a status of success; otherwise an error that `translate` knows."""
        await self._endpoint.wait_ready(self._config.timeout_s)
        response = await self._connected().post(
            f"{self._endpoint.base_url}/chat/completions",
            data=json.dumps(_body(request, stream)).encode(),
            headers={"Authorization": f"Bearer {self._endpoint.api_key}", "Content-Type": "application/json"},
        )
        if response.status == 200:
            return response
        try:
            text = await response.text(errors="replace")
        finally:
            response.release()
        raise failure(response.status, _message(text))

    def _connected(self) -> ClientSession:
        import aiohttp

        loop = asyncio.get_running_loop()
        if self._session is None or self._session.closed or self._loop is not loop:
            # Unlimited: how many runs there are at once is decided in front of the agent. Kept for less
            # than the five seconds after which vLLM's server closes an idle connection.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
                timeout=aiohttp.ClientTimeout(total=self._config.timeout_s),
            )
            self._loop = loop
        return self._session


class _Reading:
    """A reply put together from one whole body or from a stream's events."""

    def __init__(self) -> None:
        self.choices = 0
        self.text: list[str] = []
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}
        self.prompt_token_ids: list[int] | None = None
        self.token_ids: list[int] | None = None
        self.logprobs: list[dict[str, Any]] | None = None

    def take(self, body: dict[str, Any], part: str) -> str:
        """Read one body; the text that it adds."""
        self.usage = body.get("usage") or self.usage
        self.prompt_token_ids = body.get("prompt_token_ids") or self.prompt_token_ids
        if not body.get("choices"):
            return ""
        choice = body["choices"][0]
        self.choices += 1
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if choice.get("token_ids") is not None:
            self.token_ids = [*(self.token_ids or []), *choice["token_ids"]]
        entries = (choice.get("logprobs") or {}).get("content")
        if entries:
            self.logprobs = [*(self.logprobs or []), *entries]
        piece = (choice.get(part) or {}).get("content") or ""
        self.text.append(piece)
        return piece

    def reply(self, started: float) -> ChatReply:
        return ChatReply(
            text="".join(self.text),
            finish_reason=self.finish_reason,
            prompt_tokens=self.usage.get("prompt_tokens"),
            completion_tokens=self.usage.get("completion_tokens"),
            prompt_token_ids=self.prompt_token_ids,
            token_ids=self.token_ids,
            logprob=sum(entry["logprob"] for entry in self.logprobs) if self.logprobs else None,
            logprobs=self.logprobs,
            seconds=time.monotonic() - started,
        )


def _body(request: ChatRequest, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        **request.sampling,
        "model": request.model,
        "messages": request.messages,
        "return_token_ids": True,
    }
    if request.regex is not None:
        body["structured_outputs"] = {"regex": request.regex}
    if request.cache_salt is not None:
        body["cache_salt"] = request.cache_salt
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


async def _events(response: ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of a stream's events up to `[DONE]`; an error event is raised.

    Lines are cut here: aiohttp's own reader refuses lines as long as a long prompt's token ids.
    """
    pending: list[bytes] = []
    async for block in response.content.iter_any():
        *lines, rest = block.split(b"\n")
        for line in lines:
            whole, pending = b"".join([*pending, line]), []
            if not whole.startswith(b"data:"):
                continue
            data = whole[5:].strip()
            if data == b"[DONE]":
                return
            yield _checked(json.loads(data))
        if rest:
            pending.append(rest)


def _checked(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ModelError("the engine's reply is no JSON object; look into its log")
    if body.get("error"):
        error = body["error"] if isinstance(body["error"], dict) else {"message": body["error"]}
        status = error.get("code")
        raise failure(status if isinstance(status, int) else 500, str(error.get("message") or "no reason given"))
    return body


def _message(text: str) -> str:
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text or "no reason given"


def translate(exc: Exception) -> ModelError:
    """Whatever went wrong on the way as our error; without an answer to read, the engine is away."""
    if isinstance(exc, ModelError):
        return exc
    if isinstance(exc, ValueError):
        return ModelError(f"the engine's reply cannot be read: {exc}")
    return failure(None, str(exc) or type(exc).__name__)
