from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from evals.bench import Bench, environment, print_result, registry, result, run_bench, write_json
from memory.errors import ConfigError, NotFoundError


def test_aims_are_checked_against_figures() -> None:
    done = result(
        "train", {"speedup": 2.4, "loss_gap": 0.02, "note": "fp32"}, {"speedup": ">= 2", "loss_gap": "< 0.01"}
    )
    assert done.met == {"speedup": True, "loss_gap": False}


@pytest.mark.parametrize("aims", [{"speedup": "fast"}, {"note": ">= 1"}, {"missing": ">= 1"}])
def test_an_aim_that_cannot_be_checked_is_refused(aims: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        result("train", {"speedup": 2.4, "note": "fp32"}, aims)


def test_the_machine_is_described_with_what_is_installed() -> None:
    place = environment()
    assert {"cpu", "cores", "memory_gib", "system", "python", "pydantic"} <= set(place)
    assert int(place["cores"]) >= 1


def test_a_result_is_written_and_shown(tmp_path: Path) -> None:
    done = result("swap", {"load_s": 0.31}, {"load_s": "<= 1"})
    write_json(done, tmp_path / "out" / "swap.json")
    stored = json.loads((tmp_path / "out" / "swap.json").read_text(encoding="utf-8"))
    assert set(stored) == {"name", "figures", "aims", "met", "environment"}
    console = Console(record=True, width=120)
    print_result(done, console)
    shown = console.export_text()
    assert "load_s" in shown
    assert "yes" in shown


def test_a_bench_is_loaded_only_when_it_is_run() -> None:
    loaded: list[str] = []

    def load():
        loaded.append("engine")
        return lambda: result("engine", {"tokens_per_s": 42.0}, {})

    benches = registry(Bench("engine", "tokens per second", load))
    assert loaded == []
    assert run_bench("engine", benches).figures == {"tokens_per_s": 42.0}
    with pytest.raises(NotFoundError, match="there are: engine"):
        run_bench("nothing", benches)
    with pytest.raises(ConfigError, match="two benches"):
        registry(*benches.values(), *benches.values())
