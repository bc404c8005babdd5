"""The service's side of training: start the trainer process, follow it, stop it, never run two of it.

Owns the lock of a run's work folder and the trainer's process group. Imports nothing heavy: if the
trainer dies, of whatever, the service reads about it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from distill.train.config import TrainJob, TrainResult, finished
from memory.errors import TrainingError, boundary

POLL_S = 0.2
GRACE_S = 5.0
"""How long a trainer that was asked to stop may take before it is killed."""


def run(
    job: TrainJob,
    python: Path,
    on_progress: Callable[[dict[str, Any]], None],
    cancelled: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train `job` in a process of its own and wait for it; a job that is done is not trained again.

    `python` is the interpreter with torch, TRL and PEFT. `on_progress` is given each event of this
    attempt. An interrupted job goes on from its last checkpoint; a trainer that outlived the service
    that started it is ended first. Raises TrainingError with the trainer's own last word when it fails,
    when `cancelled()` becomes true, or when another live process is training the same job.
    """
    job = _absolute(job)
    done = finished(job)
    if done is not None:
        shutil.rmtree(job.work_dir, ignore_errors=True)
        return done
    job.work_dir.mkdir(parents=True, exist_ok=True)
    with _lock(job.work_dir / "lock") as lock:
        done = finished(job)
        if done is None:
            job_file = job.work_dir / "job.json"
            job_file.write_text(job.model_dump_json(indent=2), encoding="utf-8")
            _train(job, job_file, python, lock, on_progress, cancelled)
            done = finished(job)
    if done is None:
        raise TrainingError(f"the trainer ended without a result; see {job.work_dir / 'trainer.log'}")
    shutil.rmtree(job.work_dir, ignore_errors=True)
    return done


def _train(
    job: TrainJob,
    job_file: Path,
    python: Path,
    lock: IO[str],
    on_progress: Callable[[dict[str, Any]], None],
    cancelled: Callable[[], bool],
) -> None:
    """Start the trainer and follow it to its end. Raises TrainingError unless that end is a good one."""
    log = job.work_dir / "trainer.log"
    events = _Events(job.progress_path)
    with log.open("ab") as output, boundary(TrainingError, f"the trainer could not be started with {python}"):
        trainer = subprocess.Popen(
            _command(job, job_file, python),
            env=_environment(job),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # The trainer holds the lock too: it stays taken when this process dies before it.
            pass_fds=[lock.fileno()],
        )
    failure = None
    try:
        _sign(lock, trainer.pid)
        while True:
            code = trainer.poll()
            for event in events.read():
                failure = event.get("message") if event.get("event") == "error" else failure
                on_progress(event)
            if code is not None:
                break
            if cancelled():
                raise TrainingError("training was cancelled; start it again to go on from its last checkpoint")
            time.sleep(POLL_S)
    finally:
        _end_group(trainer)
    if code != 0:
        # What is killed has no last word: the log ends with whatever came before.
        killed = "it was killed, as for want of memory: lower train.batch_size or set train.activation_checkpointing"
        said = killed if code == -signal.SIGKILL else _last_line(log)
        raise TrainingError(failure or f"the trainer died (exit code {code}): {said}")


def _command(job: TrainJob, job_file: Path, python: Path) -> list[str]:
    module = ["-m", "distill.train", str(job_file), "--parent", str(os.getpid())]
    if job.config.processes == 1:
        return [str(python), *module]
    if shutil.which("nvidia-smi") is None:
        raise TrainingError(f"{job.config.processes} training processes need as many GPUs; set processes to 1")
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(job.config.processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", "0", "--multi_gpu"]
    return [str(python), *launcher, *module]


def _environment(job: TrainJob) -> dict[str, str]:
    """The trainer's environment: this project importable, every core used, no model hub asked, one GPU for a process
    without a launcher: transformers would spread over all it sees, which TRL refuses."""
    root = str(Path(__file__).resolve().parents[2])
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = job.config.threads or usable
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return {
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": first} if job.config.processes == 1 else {}),
        "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p),
        "OMP_NUM_THREADS": str(max(1, cores // job.config.processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


class _Events:
    """Reads the events that are appended to a progress file from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = path.stat().st_size if path.is_file() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The events since the last call; a line that is still being written waits for the next one."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.at += len(line)
                yield json.loads(line)


@contextmanager
def _lock(path: Path) -> Iterator[IO[str]]:
    """Hold a run's lock, after ending a trainer whose service is gone.

    Raises TrainingError when a live process holds it.
    """
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + 2 * GRACE_S
        while not _taken(file):
            _end_orphan(path)
            if time.monotonic() > deadline:
                raise TrainingError(f"{path} is held by a process that does not end; look for it with `fuser {path}`")
            time.sleep(POLL_S)
        file.truncate(0)
        yield file


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(lock: IO[str], pid: int) -> None:
    """Write into the lock who trains and for whom; start times tell a process from a later one of its number."""
    lock.truncate(0)
    lock.write(json.dumps({"trainer": [pid, _born(pid)], "service": [os.getpid(), _born(os.getpid())]}))
    lock.flush()


def _end_orphan(path: Path) -> None:
    """Kill the trainer that holds the lock if its service is dead. Raises TrainingError if that one lives."""
    try:
        holders = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return
    (trainer, trainer_born), (service, service_born) = holders["trainer"], holders["service"]
    if _born(service) == service_born:
        raise TrainingError(f"process {service} is training this job already; wait for it or cancel it there")
    if _born(trainer) == trainer_born and trainer_born is not None:
        _signal_group(trainer, signal.SIGKILL)


def _born(pid: int) -> float | None:
    """When a process began; None when there is none of this number, or only its exit code is left."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def _end_group(trainer: subprocess.Popen[bytes]) -> None:
    """End a trainer with everything it started; nothing happens when it is over."""
    if trainer.poll() is None:
        _signal_group(trainer.pid, signal.SIGTERM)
        try:
            trainer.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            _signal_group(trainer.pid, signal.SIGKILL)
            trainer.wait()
    _signal_group(trainer.pid, signal.SIGKILL)


def _signal_group(leader: int, what: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, what)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def _absolute(job: TrainJob) -> TrainJob:
    """The job with paths that mean the same in whatever folder the trainer runs."""
    parent = job.parent_adapter.absolute() if job.parent_adapter else None
    return job.model_copy(
        update={
            "dataset_dir": job.dataset_dir.absolute(),
            "base_model": job.base_model.absolute(),
            "parent_adapter": parent,
            "out_dir": job.out_dir.absolute(),
        }
    )
