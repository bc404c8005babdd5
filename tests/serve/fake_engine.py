"""A small stand-in for vLLM: a real process with the same HTTP routes, and faults on request.

Run by `fake_python` in place of the engine's interpreter. `NIGHTSCHOOL_FAKE` (JSON) switches faults on:
`die_at_start`, `unhealthy`, `sleep_harms` (adapters change nothing after a sleep); `chat_s` and `chat_log` are how
long a chat takes and where its question is written down. Adapters whose folder name says `empty` change nothing,
`weak` ones next to nothing; ones that say `refused` are refused, ones that say `wrong` are applied wrongly. An adapter
with a `says.txt` answers with it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def fake_python(folder: Path) -> Path:
    """An executable to give as `EngineConfig.python`."""
    script = folder / "fake-python"
    script.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    script.chmod(0o755)
    return script


def shift_of(folder: str | None) -> float:
    """By how much an adapter's log-probs differ from the base model's."""
    if folder is None or "empty" in folder:
        return 0.0
    if "weak" in folder:
        return 0.005
    return 0.75 if "wrong" in folder else 0.25


class FakeVLLM(ThreadingHTTPServer):
    """The server's state."""

    daemon_threads = True

    def __init__(self, port: int, key: str) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.key = key
        self.adapters: dict[str, str] = {}
        self.calls: list[str] = []
        self.unhealthy = False
        self.asleep = False
        self.sleep_harms = False
        self.harmed = False
        self.hangs_up = False
        """On who would load an adapter."""
        self.chat_s = 0.0
        self.chat_log: Path | None = None
        self.holds: str | None = None
        """What a chat does not give before `released`: its `answer`, or the `rest` behind a stream's first piece."""
        self.holding = threading.Event()
        self.released = threading.Event()

    def hold(self, what: str) -> None:
        if self.holds == what:
            self.holding.set()
            self.released.wait()


class Handler(BaseHTTPRequestHandler):
    """The routes."""

    server: FakeVLLM  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, file=sys.stderr)

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path == "/health":
            self._send(503 if self.server.unhealthy else 200, {})
        elif self.path == "/v1/models":
            self._send(200, {"data": [{"id": name} for name in ("base", *self.server.adapters)]})
        else:
            self._send(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")
        if not self._allowed():
            return
        if self.path.startswith(("/sleep", "/wake_up")):
            self.server.asleep = self.path.startswith("/sleep")
            self.server.harmed = self.server.harmed or self.server.sleep_harms
            self._send(200, {"status": self.path})
            return
        if self.server.asleep:
            self._send(500, {"error": {"message": "the engine is asleep"}})
            return
        adapters = self.server.adapters
        if self.path == "/v1/load_lora_adapter" and self.server.hangs_up:
            self.close_connection = True
        elif self.path == "/v1/load_lora_adapter":
            name = payload["lora_name"]
            self.server.calls.append(f"load {name}")
            if "refused" in payload["lora_path"]:
                self._send(400, {"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16"}})
            else:
                adapters[name] = payload["lora_path"]
                self._send(200, {})
        elif self.path == "/v1/unload_lora_adapter":
            self.server.calls.append(f"unload {payload['lora_name']}")
            adapters.pop(payload["lora_name"])
            self._send(200, {})
        elif payload["model"] != "base" and payload["model"] not in adapters:
            self._send(404, {"error": {"message": f"The model `{payload['model']}` does not exist."}})
        elif self.path == "/v1/chat/completions" and payload.get("stream"):
            self._stream(payload)
        elif self.path == "/v1/chat/completions":
            self._send(200, self._chat(payload))
        else:
            choices = [self._choice(i, payload["model"], prompt) for i, prompt in enumerate(payload["prompt"])]
            self._send(200, {"choices": choices})

    def _chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Always the same answer; the question is written down once it has been answered."""
        time.sleep(self.server.chat_s)
        self.server.hold("answer")
        if self.server.chat_log is not None:
            with self.server.chat_log.open("a") as log:
                log.write(json.dumps(payload["messages"][-1]["content"]) + "\n")
        text = self._said(payload["model"])
        text = f"Action: finish({text or 3})" if "structured_outputs" in payload else text or "Hello there."
        message = {"role": "assistant", "content": text}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": payload["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "token_ids": [4, 5]}],
            "prompt_token_ids": [1, 2, 3],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }

    def _stream(self, payload: dict[str, Any]) -> None:
        """The answer in two pieces behind the head, chunked like vLLM's."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        text = self._chat(payload)["choices"][0]["message"]["content"]
        for piece, finish in ((text[:3], None), (text[3:], "stop")):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": finish}
            self._chunk(b"data: %s\n\n" % json.dumps({"choices": [choice]}).encode())
            self.server.hold("rest")
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _said(self, model: str) -> str:
        says = Path(self.server.adapters.get(model, "nowhere")) / "says.txt"
        return says.read_text() if says.is_file() else ""

    def _choice(self, index: int, model: str, prompt: str | list[int]) -> dict[str, Any]:
        tokens = prompt if isinstance(prompt, list) else [1, 2, 3]
        shift = 0.0 if self.server.harmed else shift_of(self.server.adapters.get(model))
        logprobs = [None] + [{str(token): {"logprob": -1.0 - token - shift}} for token in tokens[1:]]
        return {"index": index, "prompt_token_ids": tokens, "prompt_logprobs": logprobs}

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self._send(401, {"error": "Unauthorized"})
        return False

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    faults = json.loads(os.environ.get("NIGHTSCHOOL_FAKE", "{}"))
    spec = importlib.util.spec_from_file_location("launcher", ROOT / "serve" / "vllm_launcher.py")
    assert spec is not None
    assert spec.loader is not None
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    launcher.end_with_parent(int(os.environ["NIGHTSCHOOL_PARENT_PID"]), whole_group=True)
    if faults.get("die_at_start"):
        sys.exit("RuntimeError: the fake engine was told to die")
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = FakeVLLM(port, os.environ["VLLM_API_KEY"])
    server.unhealthy = bool(faults.get("unhealthy"))
    server.sleep_harms = bool(faults.get("sleep_harms"))
    server.chat_s = float(faults.get("chat_s", 0))
    server.chat_log = Path(faults["chat_log"]) if "chat_log" in faults else None
    server.serve_forever()


if __name__ == "__main__":
    main()
