"""The trainer's comparison of what it would train with what was served, by real tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.codec import wire
from distill.train.config import TrainJob
from distill.train.job import load_data
from distill.train.served import FILE, check_served, served_turns
from memory.errors import TrainingError
from memory.records import Step
from tests.distill.samples import at, call, result, say, solve, task, trajectory
from tests.distill.train_fixtures import CHATML, make_tokenizer, sums, write_dataset

OTHER = "<|endoftext|>" + CHATML
"""With a token at the front that one side adds and the other does not."""


def served(
    tmp_path: Path, tokenizer: Any, end: str = "<|im_end|>", said: str = "Action: finish(2)", **fields: Any
) -> Path:
    """A file of one run with the calculator as an engine with this tokenizer would have served it."""
    one = task(1)
    run = trajectory(one, solve(1), recalled=[{"role": "user", "content": "2 + 2?"}, say("4")], **fields)
    prompt = [{"role": m["role"], "content": m["content"]} for m in wire(run.messages[:-1], run.tools)]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    step = Step(
        message=len(run.messages) - 1,
        prompt_token_ids=tokenizer(text)["input_ids"],
        token_ids=tokenizer(f"{said}{end}")["input_ids"],
        finish_reason="stop",
    )
    turns = served_turns([run.model_copy(update={"steps": [Step(message=4), step]})])
    path = tmp_path / FILE
    path.write_text("".join(turn.model_dump_json() + "\n" for turn in turns))
    return path


def test_what_was_served_by_the_same_template_is_accepted_recalled_turns_and_tools_included(tmp_path):
    tokenizer = make_tokenizer()
    assert check_served(served(tmp_path, tokenizer), tokenizer) == 1
    assert check_served(tmp_path / "none", tokenizer) == 0


def test_another_chat_template_is_refused_with_the_place_where_they_part(tmp_path):
    path = served(tmp_path, make_tokenizer(OTHER))
    with pytest.raises(TrainingError, match=r"from token 0 on: served '<\|endoftext.*trained '<\|im_start"):
        check_served(path, make_tokenizer())


def test_a_template_that_ends_turns_with_another_token_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    path = served(tmp_path, tokenizer, end="<|endoftext|>")
    with pytest.raises(TrainingError, match=r"end with '<\|endoftext\|>', trained ones would end with '<\|im_end\|>'"):
        check_served(path, tokenizer)
    stopped = served(tmp_path, tokenizer, end="<|endoftext|>", sampling={"stop": ["2"]})
    assert check_served(stopped, tokenizer) == 1, "a client's own stop sequence says nothing about the template"


@pytest.mark.parametrize(("otherwise", "alike", "refused"), [(4, 3, True), (4, 5, False), (3, 0, False)])
def test_replies_that_would_mostly_be_trained_as_another_text_are_refused(tmp_path, otherwise, alike, refused):
    tokenizer = make_tokenizer()
    same = served(tmp_path, tokenizer, said=" Action: finish(2)").read_text()
    other = served(tmp_path, tokenizer, said="Answer: 2").read_text()
    path = tmp_path / FILE
    path.write_text(other * otherwise + same * alike)
    if refused:
        with pytest.raises(TrainingError, match=r"4 of 7 .*served 'Answer: 2', trained 'Action: finish\(2\)'"):
            check_served(path, tokenizer)
    else:
        assert check_served(path, tokenizer) == otherwise + alike


def test_nothing_is_loaded_for_training_from_a_dataset_that_was_served_otherwise(tmp_path):
    write_dataset(tmp_path, sums(4))
    served(tmp_path, make_tokenizer(OTHER))
    job = TrainJob(dataset_dir=tmp_path, base_model=tmp_path, out_dir=tmp_path / "out")
    data = load_data(job, make_tokenizer(OTHER))
    assert (len(data.rows), data.served_prompts) == (4, 1)
    with pytest.raises(TrainingError, match="same tokenizer and chat template"):
        load_data(job, make_tokenizer())


def test_only_the_newest_runs_that_an_engine_gave_tokens_for_are_compared():
    step = Step(message=2, prompt_token_ids=[1])
    runs = [trajectory(task(n), [say("2")], steps=[step]) for n in range(9)]
    bare = trajectory(task(20), [call("1"), result("1"), say("1")], steps=[Step(message=2)])
    assert [s.trajectory for s in served_turns([bare, *runs], most=2)] == ["traj_task_0007", "traj_task_0008"]


def test_the_newest_runs_are_so_by_their_time_and_not_by_ids_that_are_hashes():
    step = Step(message=2, prompt_token_ids=[1])
    keyed = [trajectory(task(n), [say("2")], id=f"traj_f{n}", steps=[step], started_at=at(n)) for n in range(3)]
    minted = [trajectory(task(n), [say("2")], id=f"traj_0{n}", steps=[step], started_at=at(n)) for n in range(3, 6)]
    assert [s.trajectory for s in served_turns([*minted, *keyed], most=3)] == ["traj_03", "traj_04", "traj_05"]
