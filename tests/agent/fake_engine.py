"""An OpenAI-compatible engine on loopback that says what a test tells it to: real HTTP, no model."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

CONTEXT_LENGTH = (
    "This model's maximum context length is 2048 tokens. However, you requested 72 output tokens and your prompt "
    "contains at least 3000 input tokens. Please reduce the length of the input prompt."
)
"""vLLM 0.32's words."""


@dataclass(frozen=True)
class Says:
    """A reply: `pieces` of text, streamed or whole; token ids and log-probabilities as vLLM sends them."""

    pieces: Sequence[str] = ("hel", "lo")
    finish: str | None = "stop"
    """None in a stream: it ends without one, as when the engine died."""
    finish_with_text: bool = False
    """The last piece and the finish reason come in one event."""
    in_band_error: str | None = None
    """A stream breaks off with this error event after its pieces."""
    done: bool = True
    """A stream ends with `[DONE]`."""
    hang_up: bool = False
    """A stream's connection is torn down after its pieces."""
    prompt_token_ids: Sequence[int] = (1, 2, 3)
    token_ids: Sequence[int] = (4, 5)
    logprobs: Sequence[float] = (-0.5, -0.25)

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = len(self.prompt_token_ids), len(self.token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True)
class Refuses:
    """An HTTP error in vLLM's form, or any JSON under any status."""

    status: int
    message: str = "no"
    body: dict[str, Any] | None = None

    @property
    def payload(self) -> dict[str, Any]:
        if self.body is not None:
            return self.body
        return {"error": {"message": self.message, "type": "BadRequestError", "param": None, "code": self.status}}


@dataclass
class FakeEngine:
    """An `Endpoint`. `script`: answers in turn, the last one for ever. `requests`: the JSON bodies that came."""

    script: Sequence[Says | Refuses] = (Says(),)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    asked_ready: int = 0
    peers: list[str] = field(default_factory=list)
    """The client's address of each request: one per connection."""

    def __enter__(self) -> FakeEngine:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    async def wait_ready(self, timeout: float) -> None:
        self.asked_ready += 1

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def api_key(self) -> str:
        return "secret-key"


def _handler(engine: FakeEngine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Silence."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            turn = min(len(engine.requests), len(engine.script) - 1)
            engine.requests.append(body)
            engine.peers.append(str(self.client_address))
            engine.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = engine.script[turn]
            if isinstance(answer, Refuses):
                self._whole(answer.status, answer.payload)
            elif body.get("stream"):
                self._stream(answer, body)
            else:
                self._whole(200, _completion(answer, body["model"]))

        def _whole(self, status: int, payload: dict[str, Any]) -> None:
            data = json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, says: Says, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in _events(says, body):
                self._chunk(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
            if says.hang_up:
                self.close_connection = True
                return
            self._chunk(b"")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

    return Handler


def _token(logprob: float) -> dict[str, Any]:
    return {"token": "t", "logprob": logprob, "bytes": None, "top_logprobs": []}


def _completion(says: Says, model: str) -> dict[str, Any]:
    tokens = [_token(p) for p in says.logprobs]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(says.pieces)},
        "finish_reason": says.finish,
        "logprobs": {"content": tokens} if tokens else None,
        "token_ids": list(says.token_ids),
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [choice],
        "usage": says.usage,
        "prompt_token_ids": list(says.prompt_token_ids),
    }


def _events(says: Says, body: dict[str, Any]) -> list[dict[str, Any] | str]:
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

    def event(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**common, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    with_ids = bool(body.get("return_token_ids"))
    first = event({"role": "assistant", "content": ""})
    events: list[dict[str, Any] | str] = [
        {**first, "prompt_token_ids": list(says.prompt_token_ids)} if with_ids else first
    ]
    last = len(says.pieces) - 1
    for i, piece in enumerate(says.pieces):
        part = event({"content": piece}, says.finish if says.finish_with_text and i == last else None)
        # The engine's pieces are tokens; a test may give fewer or more ids than pieces.
        share = list(says.token_ids[i:] if i == last else says.token_ids[i : i + 1])
        tokens = says.logprobs[i:] if i == last else says.logprobs[i : i + 1]
        if with_ids:
            part["choices"][0]["token_ids"] = share
        if body.get("logprobs"):
            part["choices"][0]["logprobs"] = {"content": [_token(p) for p in tokens]}
        events.append(part)
    if says.in_band_error is not None:
        error = {"message": says.in_band_error, "type": "InternalServerError", "param": None, "code": 500}
        events.append({"error": error})
    elif says.finish is not None and not says.hang_up:
        if not says.finish_with_text:
            events.append(event({"content": ""}, says.finish))
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append({**common, "choices": [], "usage": says.usage})
    return [*events, "[DONE]"] if says.done and not says.hang_up else events
