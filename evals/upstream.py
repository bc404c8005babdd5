"""A fake OpenAI-compatible upstream for benchmarks: a fixed reply after a fixed wait, at next to no cost.

Looks enough like vLLM for the service's engine client (`engine.url`): health, models, adapters, chat with
and without streaming, token ids on request. A prompt under an action grammar gets an action. Never
a substitute for the engine in a test of what a model says.
`python -m evals.upstream --latency-ms 30` prints `{"port": N}` and serves on loopback until it is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

REPLY = "Forty-two is the answer, and it has been so for as long as anybody has asked."
ACTION = "Action: finish(42)"
PROMPT_TOKENS = 24


@dataclass
class Upstream:
    """What the connections share."""

    latency_s: float
    key: str | None = None
    models: dict[str, None] = field(default_factory=lambda: {"base": None})
    chats: int = 0
    """Chat requests that were answered: a benchmark of batches proves with it that no line ran twice."""


@dataclass(frozen=True)
class Reply:
    """A whole HTTP body, sent `wait_s` from now."""

    body: bytes
    status: int = 200
    kind: str = "application/json"
    wait_s: float = 0.0


def respond(upstream: Upstream, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
    """The reply to one request."""
    if upstream.key and headers.get("authorization") != f"Bearer {upstream.key}":
        return _error(401, "wrong key")
    match method, path:
        case "GET", "/health":
            return Reply(b"")
        case "GET", "/stats":
            return _json({"chats": upstream.chats})
        case "GET", "/v1/models":
            cards = [{"id": name, "object": "model", "created": 0, "owned_by": "fake"} for name in upstream.models]
            return _json({"object": "list", "data": cards})
        case "POST", "/v1/load_lora_adapter":
            upstream.models[json.loads(body)["lora_name"]] = None
            return _json({})
        case "POST", "/v1/unload_lora_adapter":
            upstream.models.pop(json.loads(body)["lora_name"], None)
            return _json({})
        case "POST", "/v1/chat/completions":
            return _chat(upstream, json.loads(body))
    return _error(404, f"no route {method} {path}")


def _chat(upstream: Upstream, request: dict[str, Any]) -> Reply:
    if request.get("model") not in upstream.models:
        return _error(404, f"The model `{request.get('model')}` does not exist.")
    upstream.chats += 1
    text = ACTION if "structured_outputs" in request else REPLY
    words = text.split(" ")
    usage = {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": len(words),
        "total_tokens": PROMPT_TOKENS + len(words),
    }
    head = {"id": f"chatcmpl-{upstream.chats}", "created": int(time.time()), "model": request["model"]}
    with_ids = bool(request.get("return_token_ids"))
    if request.get("stream"):
        return _streamed(head, words, usage, with_ids, upstream.latency_s)
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": None,
        "finish_reason": "stop",
    }
    extra: dict[str, Any] = {}
    if with_ids:
        choice["token_ids"] = list(range(len(words)))
        extra["prompt_token_ids"] = list(range(PROMPT_TOKENS))
    whole = head | {"object": "chat.completion", "choices": [choice], "usage": usage} | extra
    return Reply(json.dumps(whole).encode(), wait_s=upstream.latency_s)


def _streamed(
    head: dict[str, Any], words: Sequence[str], usage: dict[str, int], with_ids: bool, wait_s: float
) -> Reply:
    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps(head | {'object': 'chat.completion.chunk', 'choices': choices} | more)}\n\n"

    def piece(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **more}

    first = {"prompt_token_ids": list(range(PROMPT_TOKENS))} if with_ids else {}
    events = [event([piece({"role": "assistant", "content": ""})], **first)]
    for i, word in enumerate(words):
        ids = {"token_ids": [i]} if with_ids else {}
        last = "stop" if i == len(words) - 1 else None
        events.append(event([piece({"content": word if i == 0 else f" {word}"}, last, **ids)]))
    events += [event([], usage=usage), "data: [DONE]\n\n"]
    return Reply("".join(events).encode(), kind="text/event-stream", wait_s=wait_s)


def _json(value: Any) -> Reply:
    return Reply(json.dumps(value).encode())


def _error(status: int, message: str) -> Reply:
    return Reply(json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode(), status)


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as much of it as clients of JSON APIs use."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            first, *lines = self._received[:end].decode("latin-1").split("\r\n")
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            whole = end + 4 + int(headers.get("content-length", 0))
            if len(self._received) < whole:
                return
            body, self._received = self._received[end + 4 : whole], self._received[whole:]
            method, target, _ = first.split(" ")
            try:
                reply = respond(self._upstream, method, target.partition("?")[0], headers, body)
            except (ValueError, KeyError) as exc:
                reply = _error(400, f"unreadable request: {exc}")
            asyncio.get_running_loop().call_later(reply.wait_s, self._send, reply)

    def _send(self, reply: Reply) -> None:
        if self._transport is not None:
            head = (
                f"HTTP/1.1 {reply.status} -\r\ncontent-type: {reply.kind}\r\ncontent-length: {len(reply.body)}\r\n\r\n"
            )
            self._transport.write(head.encode() + reply.body)


async def serve(port: int, latency_s: float, key: str | None = None) -> asyncio.Server:
    """Listen on loopback; port 0 picks a free one."""
    upstream = Upstream(latency_s, key)
    return await asyncio.get_running_loop().create_server(lambda: Connection(upstream), "127.0.0.1", port, backlog=1024)


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--key")
    given = parser.parse_args()
    server = await serve(given.port, given.latency_ms / 1000, given.key)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.run(_main())
    except ImportError:
        asyncio.run(_main())
