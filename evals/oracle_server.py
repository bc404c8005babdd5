"""A teacher for benches: an OpenAI-compatible server on loopback that has a run for every task it was given.

It stands for a stronger model, errors included: a share of the questions it answers wrongly, always the same ones.
Owns the server; what the right runs are is `evals.oracle`'s.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from evals.oracle import oracle_expression
from memory.records import Message, Task, text_of

OBSERVATION = "Observation: "
"""What a tool's result begins with in the compact form of tool calls (`agent.codec`)."""


@contextmanager
def oracle_server(tasks: Iterable[Task], wrong_share: float = 0.0) -> Iterator[str]:
    """Serve until the block ends; yields the base URL, up to and with `/v1`.

    `wrong_share` in 0..1: of the questions, those that are answered wrongly. A question of none of the tasks is
    answered with an apology. VerifierError for a task of a family that the oracle does not know.
    """
    known = {task.question: oracle_expression(task) for task in tasks}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(_completion(asked, _said(asked["messages"], known, wrong_share))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the bench has a progress bar."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def _said(messages: list[Message], known: dict[str, str], wrong_share: float) -> str:
    questions = [q for m in messages if m["role"] == "user" and (q := text_of(m)) in known]
    last = text_of(messages[-1])
    if not questions:
        return "I am sorry, I do not know that."
    if last.startswith(OBSERVATION):
        seen = last.removeprefix(OBSERVATION)
        drawn = int.from_bytes(hashlib.sha256(questions[-1].encode()).digest()[:8]) / 2**64
        return f"Action: finish({f'{seen}0' if drawn < wrong_share else seen})"
    return f"Action: calc({known[questions[-1]]})"


def _completion(asked: dict[str, Any], said: str) -> dict[str, Any]:
    """A `chat.completion` object; tokens are counted in words."""
    prompt, completion = sum(len(text_of(m).split()) for m in asked["messages"]), len(said.split())
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    return {"id": "oracle", "object": "chat.completion", "created": 0, "model": asked["model"]} | {
        "choices": [choice],
        "usage": usage,
    }
