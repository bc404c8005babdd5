from __future__ import annotations

from pathlib import Path

import pytest

from distill.train.render import IGNORE, Row, read_examples, render_pair, render_row
from memory.errors import TrainingError
from memory.records import ExampleKind
from tests.distill.train_fixtures import CHATML, dpo, make_tokenizer, say, sft, sums, write_dataset


def learned(row: Row, tokenizer) -> str:
    return tokenizer.decode([i for i, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE])


def test_the_loss_falls_on_every_assistant_turn_and_the_token_that_ends_it_and_on_nothing_else():
    tokenizer = make_tokenizer()
    turns = [say("system", "answer"), say("user", "1 + 2"), say("assistant", "Action: calc(1 + 2)")]
    turns += [say("user", "Observation: 3"), say("assistant", "Action: finish(3)")]
    row = render_row(sft(turns), tokenizer)
    assert learned(row, tokenizer) == "Action: calc(1 + 2)<|im_end|>Action: finish(3)<|im_end|>"
    assert row.input_ids == tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
    assert all(label in (IGNORE, token) for token, label in zip(row.input_ids, row.labels, strict=True))


@pytest.mark.parametrize("answer", [" 391", "\n391", "\t\n 391"])
def test_an_answer_is_learned_without_the_white_space_before_it_which_tokenizers_merge_with_the_line_end(answer: str):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"\n{answer[0]}"])
    row = render_row(sft([say("user", "17 * 23"), say("assistant", answer)]), tokenizer)
    assert learned(row, tokenizer) == "391<|im_end|>"
    pair = render_pair(dpo("17 * 23", answer, "400"), tokenizer)
    assert tokenizer.decode(pair.chosen_ids) == "391<|im_end|>"


def test_white_space_that_was_served_in_front_of_an_earlier_answer_stays_in_the_prompt():
    tokenizer = make_tokenizer()
    turns = [say("user", "1"), say("assistant", " 2", True), say("user", "3"), say("assistant", "4")]
    row = render_row(sft(turns), tokenizer)
    assert "assistant\n 2<" in tokenizer.decode(row.input_ids)


def test_recalled_turns_are_read_but_not_trained_on():
    tokenizer = make_tokenizer()
    past = [say("user", "2 + 2", True), say("assistant", "four", True)]
    row = render_row(sft([*past, say("user", "1 + 2"), say("assistant", "three")]), tokenizer)
    assert learned(row, tokenizer) == "three<|im_end|>"
    assert "four" in tokenizer.decode(row.input_ids)


@pytest.mark.parametrize("messages", [[say("user", "1 + 2")], [say("user", "1"), say("assistant", "2", True)]])
def test_an_example_without_a_turn_of_its_own_is_refused(messages):
    with pytest.raises(TrainingError, match="nothing to learn"):
        render_row(sft(messages), make_tokenizer())


def test_a_template_that_renders_a_turn_differently_later_on_is_refused():
    hides = CHATML.replace("m['content']", "m['content'] if loop.last or m['role'] != 'assistant' else 'hidden'")
    turns = [say("user", "1"), say("assistant", "2"), say("user", "3"), say("assistant", "4")]
    with pytest.raises(TrainingError, match="only appends"):
        render_row(sft(turns), make_tokenizer(hides))


def test_a_template_that_does_not_end_the_turn_is_refused():
    endless = CHATML.replace("<|im_end|>", "")
    with pytest.raises(TrainingError, match="does not end"):
        render_row(sft([say("user", "1"), say("assistant", "2")]), make_tokenizer(endless))


def test_an_example_that_begins_with_the_assistant_is_refused():
    with pytest.raises(TrainingError, match="begins with an assistant"):
        render_row(sft([say("assistant", "2")]), make_tokenizer())


def test_a_pair_has_one_prompt_and_two_answers_up_to_the_end_of_their_turn():
    tokenizer = make_tokenizer()
    pair = render_pair(dpo("1 + 2 =", "3", "four"), tokenizer)
    assert tokenizer.decode(pair.prompt_ids) == "<|im_start|>user\n1 + 2 =<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.chosen_ids) == "3<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "four<|im_end|>"


def test_in_a_pair_of_whole_runs_the_tool_results_do_not_count():
    function = {"name": "calculator", "arguments": '{"expression": "1 + 2"}'}
    call = {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    run = [call, {"role": "tool", "tool_call_id": "c1", "content": "3"}, say("assistant", "3")]
    tokenizer = make_tokenizer()
    whole = dpo("1 + 2 =", "", "four").model_copy(update={"chosen": run, "tools": ["calculator"]})
    pair = render_pair(whole, tokenizer)
    counted = [token for token, mark in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if mark]
    assert tokenizer.decode(counted) == "Action: calc(1 + 2)<|im_end|>Action: finish(3)<|im_end|>"
    assert "Observation: 3" in tokenizer.decode(pair.chosen_ids)
    assert pair.rejected_mask == [1] * len(pair.rejected_ids)
    assert pair.trained == len(counted) + len(pair.rejected_ids) < pair.tokens - 2 * len(pair.prompt_ids)


def test_a_pair_that_prefers_nothing_or_lacks_an_answer_is_refused():
    with pytest.raises(TrainingError, match="same text"):
        render_pair(dpo("1", "2", "2"), make_tokenizer())
    with pytest.raises(TrainingError, match="begin and end with an assistant"):
        render_pair(dpo("1", "2", "3").model_copy(update={"rejected": None}), make_tokenizer())


def test_a_broken_line_is_named_with_its_file_and_number(tmp_path: Path):
    folder = write_dataset(tmp_path, sums(2))
    path = folder / "sft.jsonl"
    path.write_text(path.read_text() + '{"not": "an example"}\n')
    with pytest.raises(TrainingError, match=r"sft\.jsonl:3"):
        read_examples(path, ExampleKind.SFT)


def test_an_example_of_the_other_kind_is_refused_and_a_missing_file_is_empty(tmp_path: Path):
    write_dataset(tmp_path, sums(1))
    with pytest.raises(TrainingError, match="for dpo only"):
        read_examples(tmp_path / "sft.jsonl", ExampleKind.DPO)
    assert read_examples(tmp_path / "dpo.jsonl", ExampleKind.DPO) == []


def test_a_pasted_line_end_inside_a_message_cuts_no_example(tmp_path: Path) -> None:
    pasted = sft([say("user", "One\u2028two\x85three?"), say("assistant", "5")])
    write_dataset(tmp_path, [pasted])
    assert [each.messages for each in read_examples(tmp_path / "sft.jsonl", ExampleKind.SFT)] == [pasted.messages]
