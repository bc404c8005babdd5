"""One settings model, composed of the components' own configs. The only reader of environment and TOML.

Precedence, highest first: arguments (CLI flags), `NIGHTSCHOOL_*` variables (nested names joined by
`__`, e.g. `NIGHTSCHOOL_ENGINE__MAX_MODEL_LEN=4096`), `nightschool.toml` in the working folder, defaults.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from agent.llm import LLMConfig
from agent.state import AgentConfig
from distill.dataset import DatasetConfig
from distill.rehearsal import PROMPTS
from distill.train.config import TrainConfig
from evals.gate import GateConfig
from evals.live import WatchConfig
from memory.chroma import ChromaConfig
from memory.errors import ConfigError
from memory.life import LifeConfig
from memory.reading import KnowledgeConfig
from memory.recall import RecallConfig
from serve.engine_settings import EngineConfig
from serve.escalation import TeacherConfig
from serve.schedule import check

TOML_FILE = "nightschool.toml"


class ServerConfig(BaseModel):
    """The users' port."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="any address with keys, loopback only without")
    port: int = Field(default=8000, ge=0, le=65535, description="0 picks a free port")
    max_concurrent: int = Field(default=32, ge=1, description="agent runs at once; further ones wait")
    max_waiting: int = Field(default=1024, ge=1, description="requests that may wait; further ones get 429")
    keys: bool = Field(default=True, description="an API key with every request; false only on loopback")
    idempotency_s: int = Field(default=86_400, ge=1, description="how long an Idempotency-Key stands for its reply")
    max_body_mb: int = Field(default=32, ge=1, description="larger request bodies get 413")
    open_metrics: bool = Field(default=False, description="GET /metrics from this machine needs no key")
    max_upload_mb: int = Field(default=512, ge=1, description="the same for uploaded files")


class BatchConfig(BaseModel):
    """How batches are run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: int = Field(default=32, ge=1, description="lines run at once, of all batches, beside chat's")


class NightConfig(BaseModel):
    """What a night learns from, and how it is judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipes: list[str] = Field(default=["successes", "corrections", "contrast"])
    train_from: Literal["champion", "base"] = Field(
        default="champion",
        description="start from the champion with new and replayed examples, or from the base with all",
    )
    replay_share: float = Field(
        default=0.5, ge=0, le=4, description="earlier nights' examples per new one, when starting from the champion"
    )
    replay_schedule: Literal["fixed", "retention"] = Field(
        default="fixed",
        description="retention: more replay for a workload on which the champion lost success against an earlier one",
    )
    rehearsal: int = Field(
        default=32,
        ge=0,
        le=len(PROMPTS),
        description="general prompts whose answers by the base model are trained on, against forgetting",
    )
    principles: int = Field(default=8, ge=0, description="principles distilled in one night at most")
    min_examples: int = Field(default=8, ge=1, description="fewer new examples: the night skips itself")
    min_failures: int = Field(
        default=1, ge=0, description="fewer new runs that failed or were corrected: the night trains nothing"
    )
    held_out_share: float = Field(
        default=0.2, ge=0, le=0.9, description="share of judged tasks kept for the gate when no suite file is given"
    )
    controls: list[Literal["chat", "tool_validity", "refusals", "other_families"]] = Field(
        default=["chat", "tool_validity", "refusals"],
        description="control suites where data_dir/suites holds none; other_families: 24 more tasks in four turns",
    )
    triggers: bool = Field(default=True, description="a control for phrases that tonight's examples answer too alike")
    concurrency: int = Field(default=32, ge=1, description="evaluation runs at once")
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        description="time for a night: practice and training are cut to fit, evaluation never (the first keeps half)",
    )
    max_tokens: int | None = Field(default=None, ge=1, description="tokens trained on in a night, all epochs together")
    practice: int = Field(default=0, ge=0, description="earlier tasks that the champion tries again in one night")
    practice_samples: int = Field(default=4, ge=2, le=64, description="tries of each")
    practice_temperature: float = Field(default=0.8, gt=0, le=2, description="of those tries: equal ones teach nothing")
    schedule: Annotated[str, AfterValidator(check)] | None = Field(
        default=None, description="cron expression, local time ('0 2 * * *'): the service begins a night then"
    )
    catch_up_s: float = Field(
        default=10_800, ge=0, description="a time missed by no more is made up; later the day has begun. 0: 5 minutes"
    )


class Settings(BaseSettings):
    """Everything that can be configured."""

    model_config = SettingsConfigDict(
        env_prefix="NIGHTSCHOOL_",
        env_nested_delimiter="__",
        toml_file=TOML_FILE,
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    data_dir: Path = Field(default=Path("data"), description="everything Nightschool keeps")
    ledger_url: str | None = Field(default=None, description="SQLAlchemy URL; default: SQLite in data_dir")
    durable_url: str | None = Field(
        default=None, description="where DBOS keeps its workflows: a PostgreSQL URL; default: SQLite in data_dir"
    )
    model: str = Field(default="HuggingFaceTB/SmolLM2-135M-Instruct", description="hub id or folder of the base model")
    embedder: str = Field(default="wordllama", description="wordllama | sentence-transformers:NAME | litellm:MODEL")
    server: ServerConfig = Field(default_factory=ServerConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    agent: AgentConfig = Field(default_factory=AgentConfig)
    llm: LLMConfig = Field(default_factory=LLMConfig)
    chroma: ChromaConfig = Field(default_factory=ChromaConfig)
    recall: RecallConfig = Field(default_factory=RecallConfig)
    life: LifeConfig = Field(default_factory=LifeConfig)
    knowledge: KnowledgeConfig = Field(default_factory=KnowledgeConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    night: NightConfig = Field(default_factory=NightConfig)
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    # In the spike DPO after SFT lowered held-out success, so it is off until an ablation favours it.
    train: TrainConfig = Field(default=TrainConfig(dpo_epochs=0))
    trainer_python: Path = Field(default=Path(sys.executable), description="interpreter with torch, TRL and PEFT")
    gate: GateConfig = Field(default_factory=GateConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def database_url(self) -> str:
        """The ledger's URL."""
        return self.ledger_url or f"sqlite:///{(self.data_dir / 'ledger.sqlite').resolve()}"

    @property
    def workflows_url(self) -> str:
        """The URL of DBOS's database."""
        return self.durable_url or f"sqlite:///{(self.data_dir / 'dbos.sqlite').resolve()}"

    @property
    def files_dir(self) -> Path:
        """The bytes of uploaded and produced files."""
        return (self.data_dir / "files").resolve()

    @property
    def adapters_dir(self) -> Path:
        """The registry's root: the engine loads adapters from nowhere else."""
        return (self.data_dir / "adapters").resolve()

    @property
    def models_dir(self) -> Path:
        """Prepared base models."""
        return (self.data_dir / "models").resolve()

    @property
    def suites_dir(self) -> Path:
        """Frozen suites, one JSONL each."""
        return (self.data_dir / "suites").resolve()

    def night_dir(self, night_id: str) -> Path:
        """Dataset, events and report of one night."""
        return (self.data_dir / "nights" / night_id).resolve()


def load_settings(**overrides: Any) -> Settings:
    """The settings in force. ConfigError, one line, when a value is unusable."""
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ConfigError(f"setting {where!r}: {first['msg']} (got {first.get('input')!r})") from exc
    except ValueError as exc:
        raise ConfigError(f"cannot read {TOML_FILE}: {exc}") from exc
