"""The engine's settings, and what they become on this machine: vLLM's arguments, environment, dtype and memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

BASE_NAME = "base"
"""The engine's name of the model without an adapter (`Generation.served_name` of generation 0)."""


class EngineConfig(BaseModel):
    """The engine. `auto` and unset values are chosen from the machine at each start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(
        default=None, description="an external vLLM that serves the model as 'base', or several with commas; no own one"
    )
    api_key: str | None = Field(default=None, description="key of the external vLLM, or of all of them")
    python: Path | None = Field(default=None, description="interpreter with vLLM; default .engine/bin/python")
    device: Literal["auto", "cpu", "gpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU or a CPU with bf16 units, else float32"
    )
    max_model_len: int = Field(default=2048, ge=128, description="tokens of prompt and answer together")
    max_loras: int = Field(default=3, ge=1, description="adapters resident at once: champion, previous, candidate")
    max_lora_rank: int = Field(default=16, ge=1)
    max_num_seqs: int | None = Field(default=None, ge=1, description="requests computed at once; 32 on CPU, 256 on GPU")
    kv_cache_gb: int | None = Field(default=None, ge=1, description="CPU: memory for KV blocks, in GiB")
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    omp_threads: int | None = Field(
        default=None, ge=1, description="CPU: compute threads, unpinned; default: vLLM's choice"
    )
    proof_tolerance: float = Field(
        default=0.1,
        gt=0,
        description="nats on average by which the base model's log-probs may differ from the trainer's, by rounding",
    )
    during_training: Literal["share", "sleep", "stop"] = Field(
        default="share", description="beside the trainer on its GPU, or out of its way: sleep keeps the process"
    )
    extra_args: list[str] = Field(default_factory=list, description="further arguments of vLLM's server")
    start_timeout_s: float = Field(default=900.0, gt=0)
    max_restarts: int = Field(default=5, ge=0, description="within restart_window_s; one more and it has failed")
    restart_window_s: float = Field(default=900.0, gt=0)
    backoff_s: float = Field(default=1.0, ge=0, description="wait before a restart; doubles up to 30 s")
    health_every_s: float = Field(default=5.0, gt=0)
    health_patience_s: float = Field(
        default=120.0, gt=0, description="no healthy answer for so long: killed, restarted"
    )

    @property
    def urls(self) -> list[str]:
        """The external engines, each once."""
        named = (url.strip().rstrip("/") for url in (self.url or "").split(","))
        return list(dict.fromkeys(url for url in named if url))


def engine_arguments(config: EngineConfig, model: Path, port: int, on_gpu: bool, dtype: str) -> list[str]:
    """vLLM's command line."""
    arguments = {
        "--model": str(model),
        "--served-model-name": BASE_NAME,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": dtype,
        "--max-model-len": str(config.max_model_len),
        "--max-loras": str(config.max_loras),
        "--max-lora-rank": str(config.max_lora_rank),
        "--max-num-seqs": str(config.max_num_seqs or (256 if on_gpu else 32)),
        # Or the model's generation_config.json silently sets temperature, top_p and the like.
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
    }
    if on_gpu:
        arguments["--gpu-memory-utilization"] = f"{config.gpu_memory_utilization or _gpu_share():.2f}"
    else:
        # vLLM's default on CPU is 128: a prompt's shared part is reused in whole blocks only, and an
        # agent's prompts share their first few hundred tokens. The CPU kernels want a multiple of 32.
        arguments["--block-size"] = "32"
    flags = ["--enable-lora", "--enable-prefix-caching"]
    flags += ["--enable-sleep-mode"] if config.during_training == "sleep" else []
    return [*(part for pair in arguments.items() for part in pair), *flags, *config.extra_args]


def engine_environment(config: EngineConfig, key: str, data_dir: Path, on_gpu: bool) -> dict[str, str]:
    """The engine's environment: ours without what belongs to our own interpreter."""
    mine = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS"}
    env = {name: value for name, value in os.environ.items() if name not in mine}
    env |= {
        "NIGHTSCHOOL_PARENT_PID": str(os.getpid()),
        "VLLM_API_KEY": key,  # not on the command line, which every user of the machine can read
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        # vLLM offers /sleep and /wake_up only so; the port is on loopback and every path asks for the key.
        "VLLM_SERVER_DEV_MODE": str(int(config.during_training == "sleep")),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str((data_dir / "engine-cache").resolve()),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on_gpu:
        return env
    env |= {
        "NIGHTSCHOOL_REPAIR_CPU_LORA": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gb or _kv_gigabytes()),
    }
    if config.omp_threads:
        env |= {"OMP_NUM_THREADS": str(config.omp_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # Else vLLM's own choice: all cores but one, which its scheduler and our service share. Two threads on
    # two cores, spinning at every barrier, took 83 s for 32 requests beside other work, one thread 54 s.
    return env


def fitting_dtype(on_gpu: bool, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """bfloat16 where there are units for it. Measured on a CPU without: 18 tokens/s instead of 63."""
    if on_gpu:
        return "bfloat16"
    try:
        words = cpuinfo.read_text().split()
    except OSError:
        return "float32"
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(words) else "float32"


def has_gpu(python: Path) -> bool:
    """Whether the engine can use an NVIDIA GPU: one answers, and the engine is not the CPU build."""
    if vllm_version(python).startswith("vllm-cpu"):
        return False
    return bool(_nvidia_smi("name"))


def vllm_version(python: Path) -> str:
    """`vllm 0.32.0` or `vllm-cpu 0.32.0`, read from the engine's environment; `vllm` when it cannot be told."""
    for name in ("vllm_cpu", "vllm"):
        for found in python.parent.parent.glob(f"lib/python*/site-packages/{name}-*.dist-info"):
            version = found.name.removeprefix(f"{name}-").removesuffix(".dist-info")
            return f"{name.replace('_', '-')} {version}"
    return "vllm"


def _nvidia_smi(fields: str) -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[0].split(",") if done.returncode == 0 and done.stdout.strip() else []


def _gpu_share() -> float:
    """Half of the card at most, so that the trainer fits beside it; less when others hold memory."""
    try:
        free, total = (float(value) for value in _nvidia_smi("memory.free,memory.total"))
    except ValueError:
        return 0.5
    return max(0.1, min(0.5, 0.85 * free / total))


def _kv_gigabytes() -> int:
    """An eighth of the free memory, 1 to 8 GiB: 2 GiB hold 46,000 tokens of the 135M model."""
    import psutil

    return max(1, min(8, psutil.virtual_memory().available // 2**30 // 8))
