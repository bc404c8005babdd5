"""Runs vLLM's OpenAI server and never outlives who started it.

Owns the last defence against orphans: every process of the engine ends when its parent is gone, also
after a kill -9 of the service. Owns no settings: all arguments go to vLLM, all environment comes from
`serve.engine`. Started as `python -P serve/vllm_launcher.py ARGS` inside the engine's environment, so
it imports the standard library and vLLM only (-P: or this folder would shadow packages).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

POLL_S = 0.5


def end_with_parent(parent: int, *, whole_group: bool) -> None:
    """Watch from a thread; once `parent` is no longer our parent, SIGKILL this process (or its group)."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        if whole_group:
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def guard_every_path() -> None:
    """Ask for the key everywhere: vLLM's own check leaves /invocations, /tokenize and others open (vLLM #58144)."""
    from vllm.entrypoints.serve.middleware import authenticate  # pyright: ignore[reportMissingImports]

    authenticate.GUARDED_PREFIX = ("/",)


def repair_cpu_lora() -> None:
    """Give vLLM's CPU backend a LoRA that is right and fast: one small product per adapter in the batch.

    vLLM 0.32 gathers the adapter's weights once per *token* (2,048 prompt tokens: gigabytes copied per
    layer), for the vocabulary-wide head too, and in mixed batches and decoding it reads "no adapter"
    (index -1) as the last slot, so by its code: once all slots are full, plain requests to the base model get the last
    adapter's answers. Core-seconds of an adapter over the base model's: 3.8 times stock, 1.07 times
    repaired (16 at once, 135M model, rank 16). Nothing here touches the GPU backend.
    """
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase  # pyright: ignore[reportMissingImports]
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # pyright: ignore[reportMissingImports]

    def groups(indices: Any) -> list[tuple[int, Any]]:
        """(slot, its rows) for every adapter in the batch; rows None = all of them."""
        slots = indices.unique().tolist()
        if len(slots) == 1:
            return [(slots[0], None)] if slots[0] >= 0 else []
        return [(slot, (indices == slot).nonzero().flatten()) for slot in slots if slot >= 0]

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        PunicaWrapperBase.update_metadata(self, *args, **kwargs)
        self.token_groups = groups(self.token_lora_indices)
        self.sampler_groups = groups(self.sampler_indices)
        self.sampler_rows = len(self.sampler_indices)

    def add(y: Any, x: Any, a: Any, b: Any, scale: float, batch: list[tuple[int, Any]]) -> None:
        for slot, rows in batch:
            shrunk = (x if rows is None else x[rows]) @ a[slot, 0].T
            if rows is None:
                y.addmm_(shrunk, b[slot, 0].T, alpha=scale)
            else:
                y.index_add_(0, rows, shrunk @ b[slot, 0].T, alpha=scale)

    def add_lora_linear(
        self: Any, y: Any, x: Any, a: Any, b: Any, scale: float, slices: Any, *, buffer: Any = None, **_: Any
    ) -> None:
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        start = 0
        for a_slice, b_slice, width in zip(a, b, slices, strict=True):
            add(y[:, start : start + width], x, a_slice, b_slice, scale, self.token_groups)
            start += width

    def add_lora_logits(
        self: Any, y: Any, x: Any, a: Any, b: Any, scale: float, *, buffer: Any = None, **_: Any
    ) -> None:
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        # Prompt log-probs come with rows of their own, one request at a time: the sampler's row numbers beside them
        # mix requests up and, in a large batch, end the engine. Adapters of ours have no weights for the head.
        if len(x) == self.sampler_rows:
            add(y[:, : b.shape[-2]], x, a, b, scale, self.sampler_groups)

    PunicaWrapperCPU.update_metadata = update_metadata
    PunicaWrapperCPU.add_lora_linear = add_lora_linear
    PunicaWrapperCPU.add_lora_logits = add_lora_logits


def main() -> None:
    """Lead a process group of our own, watch the parent, hand over to vLLM."""
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    # The service names itself: had it died before this line, getppid() would already be init.
    end_with_parent(int(os.environ.get("NIGHTSCHOOL_PARENT_PID") or os.getppid()), whole_group=True)
    guard_every_path()
    # vLLM's own `vllm` command fails with the CPU wheel (it asks for a distribution named "vllm"), and
    # `python -m vllm.entrypoints.openai.api_server` is deprecated for this very function.
    from vllm.entrypoints.launchers.api_server.entry import main as serve  # pyright: ignore[reportMissingImports]

    serve()


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":
    # vLLM spawns its engine core and workers through multiprocessing, which imports this file again in
    # each of them: so they watch the launcher, and a kill -9 of the launcher takes them along as well.
    end_with_parent(os.getppid(), whole_group=False)
    if os.environ.get("NIGHTSCHOOL_REPAIR_CPU_LORA") == "1":
        repair_cpu_lora()
