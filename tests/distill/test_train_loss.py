from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from distill.train.config import TrainConfig
from distill.train.dpo import check_reference, dpo_trainer
from distill.train.fast import first_trained_block, skippable
from distill.train.model import load_policy, load_tokenizer, save_adapter
from distill.train.progress import Progress
from distill.train.render import Row, render_pair, render_row
from distill.train.sft import sft_trainer
from memory.errors import TrainingError
from tests.distill.train_fixtures import make_base, preferences, sums


def trained_adapter(base: Path, folder: Path, layers: int = 2) -> Path:
    """An adapter on the last blocks whose weights are not those of a fresh one."""
    import torch

    model = load_policy(base, None, TrainConfig(layers=layers), 0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    save_adapter(model, folder)
    return folder


def loss_and_gradient(base: Path, adapter: Path, rows: list[Row], folder: Path, **settings: Any) -> tuple[Any, Any]:
    import torch

    config = TrainConfig(batch_size=len(rows), checkpoint_steps=0, **settings)
    tokenizer = load_tokenizer(base)
    model = load_policy(base, adapter, config, int(tokenizer.pad_token_id))  # pyright: ignore[reportArgumentType]
    trainer = sft_trainer(model, tokenizer, rows, config, folder, Progress(folder / "progress.jsonl"))
    collate = trainer.data_collator
    batch = [trainer.train_dataset[i] for i in range(len(rows))]
    trainer.compute_loss(model, collate(batch)).backward()
    model.zero_grad()
    loss = trainer.compute_loss(model, collate(batch))  # this time a cache answers
    loss.backward()
    gradient = torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
    return loss.detach(), gradient


def render_all(base: Path, count: int = 6) -> list[Row]:
    tokenizer = load_tokenizer(base)
    return [render_row(e, tokenizer) for e in sums(count)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("profile", ["upper", "upper-cached"])
def test_the_fast_profiles_have_the_loss_and_the_gradient_of_the_standard_one(tmp_path, architecture, profile):
    import torch

    base = make_base(tmp_path / "base", architecture)
    adapter, rows = trained_adapter(base, tmp_path / "adapter"), render_all(base)
    expected = loss_and_gradient(base, adapter, rows, tmp_path, profile="standard")
    got = loss_and_gradient(base, adapter, rows, tmp_path, profile=profile)
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-3)


def test_a_cache_too_large_for_memory_lies_in_a_file_and_gives_the_same_loss(tmp_path):
    import torch

    base = make_base(tmp_path / "base")
    adapter, rows = trained_adapter(base, tmp_path / "adapter"), render_all(base)
    expected = loss_and_gradient(base, adapter, rows, tmp_path, profile="upper-cached")
    got = loss_and_gradient(base, adapter, rows, tmp_path / "work", profile="upper-cached", cache_ram_mb=0)
    assert (tmp_path / "work" / "hidden-0.bin").is_file()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("profile", ["standard", "upper-cached"])
def test_a_weight_multiplies_what_its_example_adds_to_the_loss(tmp_path, profile):
    from dataclasses import replace

    import torch

    base = make_base(tmp_path / "base")
    adapter, (first, second, *_) = trained_adapter(base, tmp_path / "adapter"), render_all(base)

    def loss(a: float, b: float) -> Any:
        rows = [replace(first, weight=a), replace(second, weight=b)]
        return loss_and_gradient(base, adapter, rows, tmp_path, profile=profile)[0]

    torch.testing.assert_close(loss(3.0, 0.5), 3 * loss(1.0, 0.0) + 0.5 * loss(0.0, 1.0))


def test_only_the_last_blocks_are_trained_by_the_upper_profiles_and_all_by_the_standard_one(tmp_path):
    base = make_base(tmp_path / "base")
    assert first_trained_block(load_policy(base, None, TrainConfig(layers=1), 0)) == 3
    assert first_trained_block(load_policy(base, None, TrainConfig(layers=9), 0)) == 0
    assert first_trained_block(load_policy(base, None, TrainConfig(profile="standard"), 0)) == 0


def test_a_model_with_a_sliding_window_is_not_taken_for_one_the_cache_knows():
    from types import SimpleNamespace

    from transformers import AutoConfig

    assert skippable(SimpleNamespace(config=AutoConfig.for_model("llama")))
    assert not skippable(SimpleNamespace(config=AutoConfig.for_model("llama", attention_dropout=0.1)))
    assert not skippable(SimpleNamespace(config=AutoConfig.for_model("mistral", sliding_window=64)))
    assert not skippable(SimpleNamespace(config=AutoConfig.for_model("olmo2")))


def pair_trainer(base: Path, adapter: Path, folder: Path, weight: float = 1.0, **settings: Any) -> Any:
    from dataclasses import replace

    config = TrainConfig(checkpoint_steps=0, dpo_batch_size=4, **settings)
    tokenizer = load_tokenizer(base)
    model = load_policy(base, adapter, config, int(tokenizer.pad_token_id))  # pyright: ignore[reportArgumentType]
    pairs = [replace(render_pair(e, tokenizer), weight=weight) for e in preferences(4)]
    return dpo_trainer(model, tokenizer, pairs, config, folder, Progress(folder / "progress.jsonl"))


@pytest.mark.parametrize("settings", [{}, {"dpo_sft_weight": 1.0}])
def test_before_its_first_step_dpo_has_a_loss_of_ln_2_against_the_adapter_it_starts_from(tmp_path, settings):
    base = make_base(tmp_path / "base")
    trainer = pair_trainer(base, trained_adapter(base, tmp_path / "adapter"), tmp_path, **settings)
    assert trainer.starting_loss() == pytest.approx(math.log(2), abs=1e-5)
    check_reference(trainer.starting_loss())
    assert "ref" not in trainer.model.peft_config


def test_a_reference_that_is_not_the_policy_is_refused(tmp_path):
    import torch

    base = make_base(tmp_path / "base")
    trainer = pair_trainer(base, trained_adapter(base, tmp_path / "adapter"), tmp_path)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.zero_()  # as if the reference had been taken from another model than the policy
    with pytest.raises(TrainingError, match="reference is not the policy"):
        check_reference(trainer.starting_loss())
    with pytest.raises(TrainingError, match="reference is not the policy"):
        check_reference(math.nan)


def test_each_token_by_which_the_chosen_answer_is_longer_widens_the_margin(tmp_path):
    base = make_base(tmp_path / "base")
    trainer = pair_trainer(base, trained_adapter(base, tmp_path / "adapter"), tmp_path, dpo_length_alpha=0.25)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    # Policy and reference are one, so the margin is the lengths' alone.
    longer = [len(r["chosen_ids"]) - len(r["rejected_ids"]) for r in trainer.train_dataset]
    expected = sum(math.log1p(math.exp(-0.25 * tokens)) for tokens in longer) / 4
    assert any(longer)
    loss = trainer.compute_loss(trainer.model, batch).detach()
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert trainer.starting_loss() == pytest.approx(math.log(2), abs=1e-5), "the check sees the policy, not the lengths"


def test_what_a_tool_said_does_not_move_the_policy(tmp_path):
    from dataclasses import replace

    base = make_base(tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter")

    def reference(masked: bool) -> tuple[float, float]:
        config = TrainConfig(checkpoint_steps=0)
        tokenizer = load_tokenizer(base)
        model = load_policy(base, adapter, config, int(tokenizer.pad_token_id))  # pyright: ignore[reportArgumentType]
        pair = render_pair(preferences(1)[0], tokenizer)
        mask = [0, *pair.chosen_mask[1:]] if masked else pair.chosen_mask
        trainer = dpo_trainer(
            model, tokenizer, [replace(pair, chosen_mask=mask)], config, tmp_path, Progress(tmp_path / "p")
        )
        row = trainer.train_dataset[0]
        return row["ref_chosen_logps"], row["ref_rejected_logps"]

    (whole, other), (part, same) = reference(False), reference(True)
    assert part > whole
    assert same == pytest.approx(other)


def test_the_precomputed_reference_is_what_the_policy_says_of_the_answers_before_training(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter")
    trainer = pair_trainer(base, adapter, tmp_path)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base)), str(adapter)).eval()

    def said(prompt: list[int], answer: list[int], model: Any) -> float:
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad():
            scores = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        return float(scores.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :].sum())

    for row in trainer.train_dataset:
        for side in ("chosen", "rejected"):
            got, prompt, answer = row[f"ref_{side}_logps"], row["prompt_ids"], row[f"{side}_ids"]
            assert got == pytest.approx(said(prompt, answer, policy), abs=1e-3)
            with policy.disable_adapter():
                assert abs(got - said(prompt, answer, policy)) > 0.01, "not the base model's, which TRL falls back to"


def test_a_weight_multiplies_the_pull_of_a_preference_and_leaves_the_loss_comparable(tmp_path):
    import torch

    base = make_base(tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter")

    def pull(weight: float) -> tuple[float, Any]:
        trainer = pair_trainer(base, adapter, tmp_path, weight)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return float(loss), torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.grad is not None])

    (loss, once), (same, thrice) = pull(1.0), pull(3.0)
    assert same == pytest.approx(loss)
    torch.testing.assert_close(thrice, 3 * once, atol=1e-6, rtol=1e-4)
    assert float(once.abs().max()) > 0
