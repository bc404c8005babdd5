"""Parts that the trainer's tests share: a tiny random model with its own tokenizer, and small datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memory.records import RECALLED, Example, ExampleKind, Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str = CHATML) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator(["user assistant system question answer Action: calc(1 + 2)"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def make_base(folder: Path, architecture: str = "llama", template: str = CHATML) -> Path:
    """A random four-block model with its tokenizer, saved as a user's base model would be."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    tokenizer = make_tokenizer(template)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    set_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def say(role: str, content: str, recalled: bool = False) -> Message:
    return {"role": role, "content": content, **({"name": RECALLED} if recalled else {})}


def sft(messages: list[Message], weight: float = 1.0) -> Example:
    return Example(recipe="successes", kind=ExampleKind.SFT, task_id="task_1", messages=messages, weight=weight)


def dpo(question: str, chosen: str, rejected: str, weight: float = 1.0) -> Example:
    return Example(
        recipe="contrast",
        kind=ExampleKind.DPO,
        task_id="task_1",
        messages=[say("user", question)],
        chosen=[say("assistant", chosen)],
        rejected=[say("assistant", rejected)],
        weight=weight,
    )


def sums(count: int) -> list[Example]:
    """Rows of different lengths and weights, every other one with a recalled run before it."""
    rows = []
    for i in range(count):
        past = [say("user", "1 + 1 =", True), say("assistant", "2", True)] if i % 2 else []
        asked = say("user", f"question {i}: " + "1 + " * (i % 4) + f"{i} =")
        rows.append(sft([say("system", "answer"), *past, asked, say("assistant", str(i + i % 4))], 0.5 + i % 3))
    return rows


def preferences(count: int) -> list[Example]:
    return [dpo(f"question {i}", f"answer {i}", "1 + " * (1 + i % 3), weight=1.0 + i % 2) for i in range(count)]


def write_dataset(folder: Path, examples: list[Example]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ExampleKind:
        lines = [e.model_dump_json() + "\n" for e in examples if e.kind is kind]
        if lines:
            (folder / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
