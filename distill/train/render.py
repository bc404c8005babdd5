"""Examples as token ids, with the loss on what the assistant said and nothing else.

Owns reading the dataset files and the rule of what is trained on. The text comes from `agent.codec`
and the model's own chat template, exactly as it is served; no text is composed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from memory.errors import TrainingError, boundary
from memory.jsonl import lines_of
from memory.records import RECALLED, Example, ExampleKind, Message, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

IGNORE = -100
"""The label of a token that carries no loss (PyTorch's convention)."""


@dataclass(frozen=True)
class Row:
    """One SFT example: `labels` repeats `input_ids` where the loss falls and is `IGNORE` elsewhere."""

    input_ids: list[int]
    labels: list[int]
    weight: float

    @property
    def trained(self) -> int:
        """Tokens with loss."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Pair:
    """One DPO example: two answers to the same prompt, each a turn or the rest of a run.

    The masks are 1 where a token counts: what the assistant said, and not the tool results in between.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    weight: float
    chosen_mask: list[int]
    rejected_mask: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longer answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def tokens(self) -> int:
        """Tokens that one epoch runs through the model."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def trained(self) -> int:
        """Tokens with loss."""
        return sum(self.chosen_mask) + sum(self.rejected_mask)


def read_examples(path: Path, kind: ExampleKind) -> list[Example]:
    """The examples of a dataset file, in its order; [] when there is no such file.

    Raises TrainingError naming the line that is no example of `kind`.
    """
    if not path.is_file():
        return []
    examples = []
    for number, line in enumerate(lines_of(path.read_text(encoding="utf-8")), start=1):
        if not line.strip():
            continue
        with boundary(TrainingError, f"{path}:{number} is not an example; build the dataset again"):
            example = Example.model_validate_json(line)
        if example.kind is not kind:
            raise TrainingError(f"{path}:{number} holds a {example.kind} example; this file is for {kind} only")
        examples.append(example)
    return examples


def render_all(
    examples: Iterable[Example],
    render: Callable[[Example, PreTrainedTokenizerBase], T],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[tuple[Example, T]], list[str]]:
    """(each example with what `render` makes of it, why that could not be done for others). One that cannot be rendered
    must not end a night: it would end every later one too, since what a failed night had stays to be learned."""
    made: list[tuple[Example, T]] = []
    flaws: list[str] = []
    for example in examples:
        try:
            made.append((example, render(example, tokenizer)))
        except TrainingError as error:
            flaws.append(str(error))
    return made, flaws


def render_row(example: Example, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Token ids and labels of an SFT example.

    The loss falls on every assistant message that memory did not put there: all of its content and
    the token that ends its turn, and nothing after it. Raises TrainingError when that leaves no token,
    or when the chat template renders a turn differently once others follow it.
    """
    messages = _plain(example.messages, example)
    input_ids = _ids(messages, tokenizer)
    labels = [IGNORE] * len(input_ids)
    for index, message in enumerate(example.messages):
        if message.get("role") != "assistant" or message.get("name") == RECALLED:
            continue
        start, end = _turn(messages[: index + 1], tokenizer, input_ids, example.id)
        labels[start:end] = input_ids[start:end]
    row = Row(input_ids, labels, example.weight)
    if row.trained == 0:
        raise TrainingError(f"example {example.id} has no assistant turn of its own: there is nothing to learn from it")
    return row


def render_pair(example: Example, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Token ids of a DPO example: its prompt as served, and both answers up to the end of their last turn.

    Raises TrainingError when an answer is missing, does not begin and end with an assistant turn, or when both are
    the same.
    """
    answers, masks = [], []
    prompt_ids: list[int] = []
    for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
        if not answer or {answer[0].get("role"), answer[-1].get("role")} != {"assistant"}:
            raise TrainingError(f"example {example.id}: `{name}` must begin and end with an assistant message")
        messages = _plain([*example.messages, *answer], example)
        input_ids = _ids(messages, tokenizer)
        turns = [
            _turn(messages[: index + 1], tokenizer, input_ids, example.id)
            for index in range(len(example.messages), len(messages))
            if messages[index]["role"] == "assistant"
        ]
        (start, _), (_, end) = turns[0], turns[-1]
        mask = [0] * len(input_ids)
        for first, last in turns:
            mask[first:last] = [1] * (last - first)
        prompt_ids = input_ids[:start]
        answers.append(input_ids[start:end])
        masks.append(mask[start:end])
    chosen, rejected = answers
    if chosen == rejected:
        raise TrainingError(f"example {example.id}: chosen and rejected are the same text, which prefers nothing")
    return Pair(prompt_ids, chosen, rejected, example.weight, *masks)


def ids_of_prompt(messages: list[Message], tools: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a conversation up to where the assistant begins its next turn."""
    return _ids(_rendered(messages, tools), tokenizer, prompt=True)


def text_of_turn(message: Message, tools: list[str]) -> str:
    """What an assistant turn says, as it is trained."""
    return text_of(_rendered([message], tools)[0])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a trained assistant turn ends with. Raises TrainingError when the template has none."""
    turn: list[Message] = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    whole = _ids(turn, tokenizer)
    return whole[_turn(turn, tokenizer, whole, "of two turns")[1] - 1]


def _plain(messages: list[Message], example: Example) -> list[Message]:
    """An example's messages in text form. What the assistant is to say begins without white space, which tokenizers
    merge with the line end that opens its turn, and templates trim."""
    plain = _rendered(messages, example.tools)
    for said, message in zip(plain, messages, strict=True):
        if message.get("role") == "assistant" and message.get("name") != RECALLED:
            said["content"] = said["content"].lstrip()
    return plain


def _rendered(messages: list[Message], tools: list[str]) -> list[Message]:
    """Messages as role and content only, in the text form that the served model speaks."""
    from agent.codec import wire

    return [{"role": m["role"], "content": text_of(m)} for m in wire(messages, tools)]


def _ids(messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> list[int]:
    """Token ids of a conversation by the chat template; with `prompt`, up to where the assistant begins."""
    with boundary(TrainingError, "the model's chat template refused a conversation"):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType, reportArgumentType]


def _turn(upto: list[Message], tokenizer: PreTrainedTokenizerBase, whole: list[int], example: str) -> tuple[int, int]:
    """Where the last message of `upto` begins and ends within the token ids of the whole conversation."""
    if len(upto) < 2:
        raise TrainingError(f"example {example} begins with an assistant turn; put a user or system message first")
    head, tail = _ids(upto[:-1], tokenizer, prompt=True), _ids(upto, tokenizer)
    if tail[: len(head)] != head or whole[: len(tail)] != tail:
        raise TrainingError(
            f"example {example}: the chat template renders turn {len(upto) - 1} differently as a prompt and in the "
            "whole conversation, so its tokens cannot be told apart; use a template that only appends"
        )
    enders = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for end in range(len(tail), len(head), -1):
        if tail[end - 1] in enders:
            return len(head), end
    raise TrainingError(f"example {example}: the chat template does not end an assistant turn with a special token")
