"""`nightschool memory …` without a service, and beside a running one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from memory.records import MemoryKind, Principle, Recalled
from serve import cli_memory
from serve.cli import app
from serve.wiring import announce, open_ledger
from tests.memory import samples
from tests.serve.fakes import OPERATOR_TOKEN, running, settings_in


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_memory, "out", Console(width=300))


def memory(folder: Path, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["--data-dir", str(folder / "data"), "memory", *arguments], input=stdin)


def done(folder: Path, *arguments: str) -> str:
    result = memory(folder, *arguments)
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    return result.output


def test_a_principle_lives_its_life_without_a_service(tmp_path: Path) -> None:
    item = done(tmp_path, "add", "Count the cows [red] before the goats.", "--kind", "guiding").strip()
    assert item in done(tmp_path, "search", "counting cows")
    assert item not in done(tmp_path, "search", "counting cows", "--tenant", "other")
    assert item not in done(tmp_path, "search", "counting cows", "--workload", "kitchen")
    done(tmp_path, "edit", item, "Count the sheep.")
    done(tmp_path, "pin", item)
    shown = json.loads(done(tmp_path, "show", item))
    assert (shown["text"], shown["pinned"]) == ("Count the sheep.", True)
    done(tmp_path, "unpin", item)
    done(tmp_path, "retire", item, "--why", "wrong")
    assert item not in done(tmp_path, "search", "counting sheep")
    assert "retired" in done(tmp_path, "stats")
    done(tmp_path, "restore", item)
    history = json.loads(done(tmp_path, "show", item))["history"]
    assert [entry["why"] for entry in history][-2:] == ["operator: wrong", "operator: by hand"]
    assert "holds 1 items" in done(tmp_path, "reindex")


def test_items_are_listed_by_workload_and_status(tmp_path: Path) -> None:
    farm, kitchen = (done(tmp_path, "add", f"A rule of the {w}.", "--workload", w).strip() for w in ("farm", "kitchen"))
    listed = done(tmp_path, "list")
    assert farm in listed
    assert kitchen in listed
    assert kitchen not in done(tmp_path, "list", "--workload", "farm")
    assert farm not in done(tmp_path, "list", "--status", "retired")
    assert farm not in done(tmp_path, "list", "--tenant", "other")
    assert memory(tmp_path, "list", "--status", "lost").exit_code == 2
    file = tmp_path / "farm.jsonl"
    done(tmp_path, "export", str(file), "--workload", "farm")
    assert json.loads(file.read_text())["item"]["id"] == farm
    assert "2" in done(tmp_path, "stats")
    assert "1" in done(tmp_path, "stats", "--workload", "farm")


def test_a_reply_says_what_memory_did_for_it(tmp_path: Path) -> None:
    ledger = open_ledger(settings_in(tmp_path))
    item = samples.principle("Count the cows.")
    task = samples.task("How many cows?")
    figures = {"similarity": 0.9, "score": 0.5, "recency": 1.0, "rank": 0.83, "tokens": 9, "why": "it is near"}
    recalled = [Recalled(id=item.id, kind=MemoryKind.PRINCIPLE, **figures)]
    run = samples.trajectory(task).model_copy(update={"recalled": recalled})
    ledger.add_principle(item)
    ledger.add_run(task, run)
    ledger.close()
    told = json.loads(done(tmp_path, "why", f"chatcmpl-{run.id}"))
    assert (told["id"], told["recalled"][0]["text"], told["recalled"][0]["why"]) == (run.id, item.text, "it is near")
    assert "no trajectory" in str(memory(tmp_path, "why", run.id, "--tenant", "other").exception)


def test_no_command_reaches_another_tenants_item(tmp_path: Path) -> None:
    item = done(tmp_path, "add", "The vault opens at nine.", "--tenant", "victim").strip()
    for arguments in (["show", item], ["edit", item, "x"], *([verb, item] for verb in ("pin", "unpin", "retire"))):
        assert "no memory item" in str(memory(tmp_path, *arguments, "--tenant", "thief").exception)
    assert json.loads(done(tmp_path, "show", item, "--tenant", "victim"))["text"] == "The vault opens at nine."


def test_an_export_is_imported_once(tmp_path: Path) -> None:
    for text in ("Rule\u2028one.", "Rule\rtwo."):
        done(tmp_path, "add", text)
    file = str(tmp_path / "memory.jsonl")
    done(tmp_path, "export", file)
    assert "0 added, 2 known" in done(tmp_path, "import", file)
    (tmp_path / "new").mkdir()
    assert "2 added, 0 known" in done(tmp_path / "new", "import", file)
    done(tmp_path / "new", "export", f"{file}.again")
    assert Path(f"{file}.again").read_bytes() == Path(file).read_bytes()
    Path(file).write_text("{}\n")
    assert "line 1" in str(memory(tmp_path, "import", file).exception)
    assert "cannot import" in str(memory(tmp_path, "import", f"{file}.none").exception)


def test_forgetting_asks_first(tmp_path: Path) -> None:
    item = done(tmp_path, "add", "Zebras sleep standing up.", "--tenant", "gone").strip()
    assert memory(tmp_path, "forget", "--tenant", "gone", stdin="n\n").exit_code == 1
    assert "names nobody" in str(memory(tmp_path, "forget", "--tenant", "gone", "--user", "", "--yes").exception)
    done(tmp_path, "show", item, "--tenant", "gone")
    assert json.loads(done(tmp_path, "forget", "--tenant", "gone", "--yes"))["counts"]["memory_items"] == 1
    assert memory(tmp_path, "show", item, "--tenant", "gone").exit_code != 0


def test_beside_a_running_service_its_index_follows(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings, lambda _: "Three.") as (url, services):
        announce(settings.data_dir, url, OPERATOR_TOKEN)
        with (settings.data_dir / "service.lock").open("a+") as lock:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
            done(tmp_path, "add", "Owls hunt at night.", "--tenant", "far")
            assert services.index.count() == 1
            assert "holds 1 items" in done(tmp_path, "reindex")
            done(tmp_path, "forget", "--tenant", "far", "--yes")
            assert services.index.count() == 0


def test_a_principle_that_cannot_be_is_refused(tmp_path: Path) -> None:
    assert "kind" in str(memory(tmp_path, "add", "x", "--kind", "loud").exception)
    assert "text" in str(memory(tmp_path, "add", " ").exception)
    ledger = open_ledger(settings_in(tmp_path))
    kept: list[Principle] = ledger.principles()
    run = samples.remember(ledger, "How many?")
    ledger.close()
    assert kept == []
    assert "cannot be reworded" in str(memory(tmp_path, "edit", run.id, "x").exception)
