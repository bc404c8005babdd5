"""The `python` tool: code a model wrote, run in pydantic-monty's sandbox in a worker process.

Covered: a subset of Python (expressions, functions, comprehensions, the pure parts of the standard
library that monty offers), bounded in seconds and bytes. Not covered, and refused with an error that
the model reads: files, environment, network, imports of anything else, subprocesses. The worker is a
process of its own, so a crash of the interpreter is an error of one call.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from memory.errors import ToolError

PRINTED_BYTES = 1_000_000
"""Printing more than this is an error: the text is collected outside the sandbox's own memory."""


class SandboxConfig(BaseModel):
    """Limits of one run of generated code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(default=2.0, gt=0, description="wall time of one run")
    memory_bytes: int = Field(default=64_000_000, gt=0, description="memory of one run")
    output_chars: int = Field(default=2000, gt=0, description="what the model gets to read at most")


def run_python(code: str, config: SandboxConfig | None = None) -> str:
    """What the code printed and the value of its last expression. ToolError when it failed."""
    import pydantic_monty

    limits = config or SandboxConfig()
    printed = pydantic_monty.CollectString(max_bytes=PRINTED_BYTES)
    try:
        with (
            pydantic_monty.Monty() as pool,
            pool.checkout(
                limits={"max_feed_duration_secs": limits.seconds, "max_memory": limits.memory_bytes},
                # The clock of the limits stands still in a sleep, so sleeping takes no time at all.
                os_policy={"sleep": "zero"},
            ) as session,
        ):
            value = session.feed_run(code.strip(), print_callback=printed)
        shown = printed.output + ("" if value is None else str(value))
    except Exception as exc:
        # Whatever the interpreter or its worker raises is the generated code's failure, not ours, and
        # so is a value that has no text (an integer of 5000 digits).
        raise ToolError(" ".join(str(exc).split())[:400] or type(exc).__name__) from exc
    return shown[: limits.output_chars] or "(nothing was printed)"
