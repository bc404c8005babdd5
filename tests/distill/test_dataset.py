"""The dataset: what enters, how memory is shown, the files."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agent.prompts
from distill.dataset import Dataset, DatasetConfig, build, read_manifest, write
from distill.recipes import RECIPES
from distill.snapshot import Snapshot
from memory.errors import ConfigError, ConflictError, NotEnoughExperienceError, TrainingError
from memory.recall import NoMemory
from memory.records import RECALLED, Example, ExampleKind, FeedbackKind, Step, Trust
from tests.distill.samples import (
    SYSTEM,
    OneRun,
    at,
    call,
    compose,
    corrected,
    correction,
    feedback,
    result,
    say,
    snapshot,
    solve,
    task,
    trajectory,
)

SMALL = DatasetConfig(min_examples=1)
PARSED = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}]}
ALL = ["corrections", "successes", "contrast"]


def made_of(material: Snapshot, recipes: list[str] | None = None, memory=None, **config) -> Dataset:
    settings = SMALL.model_copy(update=config)
    return build(material, recipes or ["corrections"], memory or NoMemory(), compose, settings)


def test_an_example_shows_the_recalled_block_as_it_is_served_and_once_more_without():
    memory = OneRun()
    data = made_of(corrected([1]), memory=memory)
    seen, bare = sorted(data.examples, key=lambda e: not e.with_memory)
    assert (seen.with_memory, bare.with_memory) == (True, False)
    block = [{**m, "name": RECALLED} for m in memory.recall(task(1)).runs[0].messages]
    assert seen.messages == [SYSTEM, *block, *task(1).messages, *solve(1)]
    assert bare.messages == [SYSTEM, *task(1).messages, *solve(1)]
    assert data.counts == {"corrections": 1}, "the copy without memory is not counted"


def test_memory_is_asked_without_the_task_itself_and_once_for_each_task():
    memory = OneRun()
    made_of(corrected([1]), ALL, memory)
    assert memory.excluded == [("task_0001", frozenset({"task_0001"}), frozenset({task(1).fingerprint}))]


def test_an_example_without_anything_recalled_appears_once():
    (example,) = made_of(corrected([1])).examples
    assert not example.with_memory


def test_the_share_that_is_repeated_without_memory_is_chosen_by_question_and_seed():
    def bare(**config) -> set[str]:
        data = made_of(corrected(range(200)), memory=OneRun(), max_per_author=999, **config)
        return {e.task_id for e in data.examples if not e.with_memory}

    assert bare(repeat_without=0.0) == set()
    half = bare(repeat_without=0.5)
    assert 70 < len(half) < 130
    assert half == bare(repeat_without=0.5)
    assert half != bare(repeat_without=0.5, seed=1)
    assert half < bare(repeat_without=0.8), "a larger share only adds"


def test_a_pair_is_shown_as_served_and_never_twice():
    data = made_of(corrected([1]), ["contrast"], OneRun())
    (pair,) = data.examples
    assert pair.kind is ExampleKind.DPO
    assert pair.with_memory
    assert pair.messages[0] == SYSTEM
    assert pair.messages[-1] == task(1).messages[-1]


def test_the_served_prompt_of_the_agent_stands_in_front_of_the_run():
    memory, one = OneRun(), task(1)
    data = build(corrected([1]), ["corrections"], memory, agent.prompts.compose, SMALL)
    (seen,) = [e for e in data.examples if e.with_memory]
    recall = memory.recall(one)
    assert seen.messages == [
        *(
            {**m, "name": RECALLED} if m["role"] == "assistant" else m
            for m in agent.prompts.compose(one, ["calculator"], recall)
        ),
        *solve(1),
    ]


def test_the_loss_stays_off_assistant_turns_that_came_with_the_task():
    history = [{"role": "user", "content": "Hi"}, say("Hello"), {"role": "user", "content": "What is 1 + 1?"}]
    one = task(1, messages=history)
    (example,) = made_of(snapshot((one, trajectory(one, solve(1)))), ["successes"]).examples
    assert example.messages[1:4] == [history[0], say("Hello", name=RECALLED), history[2]]
    assert example.messages[4:] == solve(1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12, unique=True),
    st.sets(st.integers(0, 12)),
    st.booleans(),
)
def test_held_out_tasks_never_enter(numbers, held, with_texts):
    material = corrected(numbers)
    held_tasks = [task(n, id=f"suite_{n}") for n in held]
    fingerprints = frozenset(t.fingerprint for t in held_tasks)
    material = Snapshot(
        material.trajectories,
        material.feedback,
        material.tasks,
        held_out=frozenset() if with_texts else fingerprints,
        held_out_tasks=held_tasks if with_texts else [],
    )
    free = [n for n in numbers if n not in held]
    if not free:
        with pytest.raises(NotEnoughExperienceError):
            made_of(material, ALL)
        return
    data = made_of(material, ALL, OneRun())
    assert {e.task_id for e in data.examples} == {task(n).id for n in free}
    assert sum(count for reason, count in data.dropped.items() if reason.startswith("held out")) == 2 * (
        len(numbers) - len(free)
    )


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False))
def test_the_same_snapshot_in_any_order_gives_the_same_bytes(tmp_path_factory, random):
    material = corrected(range(10))
    extra = [(task(n), trajectory(task(n), solve(n))) for n in range(20, 26)]
    tasks = {**material.tasks, **{t.id: t for t, _ in extra}}
    all_runs = [*material.trajectories, *(run for _, run in extra)]

    def files(shuffle: bool) -> dict[str, bytes]:
        runs, said, known = list(all_runs), list(material.feedback), list(tasks.items())
        if shuffle:
            random.shuffle(runs)
            random.shuffle(said)
            random.shuffle(known)
        folder = tmp_path_factory.mktemp("night") / "data"
        write(made_of(Snapshot(runs, said, dict(known)), ALL, OneRun(), repeat_without=0.5), folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert files(shuffle=True) == files(shuffle=False)


def test_a_named_users_own_references_are_capped_like_an_authors_words():
    tasks = [task(n, user="ann" if n < 30 else "bob") for n in range(40)]
    runs = [trajectory(t, solve(n)) for n, t in enumerate(tasks)]
    material = snapshot(*zip(tasks, runs, strict=True))
    config = DatasetConfig(max_per_author=12, max_per_cluster=1000, min_examples=1, recalled=False)
    dataset = build(material, ["successes"], NoMemory(), compose, config)
    users = Counter(material.tasks[e.task_id].user for e in dataset.examples)
    assert users == {"ann": 12, "bob": 10}


@pytest.mark.parametrize(
    ("callers", "kept"),
    [
        pytest.param(["key:bulk"], 12, id="a key is one voice, without users"),
        pytest.param(["key:bulk", "user"], 12, id="and with users, whom it may make up"),
        pytest.param(["app:shop", "user"], 30, id="a vouching key's users are their own"),
        pytest.param(["app:shop"], 12, id="a vouching key that names nobody"),
        pytest.param([None], 30, id="the operator, or a service without keys"),
    ],
)
def test_a_keys_own_references_are_capped_as_one_voice(callers: list[str | None], kept: int):
    named = "user" in callers
    tasks = [task(n, caller=callers[0], user=f"user {n}" if named else None) for n in range(30)]
    material = snapshot(*[(t, trajectory(t, solve(n))) for n, t in enumerate(tasks)])
    data = made_of(material, ["successes"], max_per_author=12, max_per_cluster=1000)
    assert data.counts == {"successes": kept}


def test_a_thousand_corrections_of_one_author_do_not_drown_the_others():
    poison, honest = corrected(range(1000), "eve"), corrected(range(2000, 2020), "ann")
    material = Snapshot(
        poison.trajectories + honest.trajectories, poison.feedback + honest.feedback, poison.tasks | honest.tasks
    )
    data = made_of(material, max_per_author=30)
    by_author = Counter("eve" if e.task_id < "task_2000" else "ann" for e in data.examples)
    assert by_author == {"eve": 30, "ann": 20}
    assert data.dropped == {"over max_per_author": 970}
    assert len(data.left) == 970
    assert not {source for e in data.examples for source in e.sources} & set(data.left)


def test_an_author_whose_cap_is_full_does_not_go_on_beside_new_names():
    pairs, said = [], []
    for n in range(20):
        bad = trajectory(task(n), [say("no idea")], 0.0, id=f"traj_{n}_bad")
        good = trajectory(task(n), solve(n), id=f"traj_{n}_good", started_at=at(60))
        pairs += [(task(n), bad), (task(n), good)]
        for name in ("eve", f"friend {n}"):
            said.append(feedback(bad, FeedbackKind.SCORE, 0.0, name, trust=Trust.TRUSTED))
    data = made_of(snapshot(*pairs, said=said), ["dissatisfaction"], max_per_author=12)
    assert data.counts == {"dissatisfaction": 12}
    assert data.dropped == {"over max_per_author": 8}


def test_the_cap_of_a_workload_spares_the_others_and_thins_questions_evenly():
    sums, others = corrected(range(40)), corrected(range(100, 105), workload="other")
    material = Snapshot(
        sums.trajectories + others.trajectories, sums.feedback + others.feedback, sums.tasks | others.tasks
    )
    data = made_of(material, max_per_workload=10)
    assert Counter(e.workload for e in data.examples) == {"default": 10, "other": 5}
    assert data.dropped == {"over max_per_workload": 30}
    assert max(e.task_id for e in data.examples if e.workload == "default") > "task_0015", "not simply the oldest"


def test_nearly_the_same_question_asked_a_hundred_times_has_only_so_many_examples_whoever_asks():
    words = "please tell me in which year this very famous old stone bridge over a wide river was built by monks"
    variants = [task(n, f"{words} {'now' if n % 2 else 'today'}{'!' * (n // 2)}") for n in range(100)]
    others = [task(n) for n in range(200, 205)]
    made = snapshot(*[(one, trajectory(one, [say("1750")])) for one in [*variants, *others]])
    data = made_of(made, ["successes"], max_per_cluster=6)
    assert Counter(e.task_id < "task_0200" for e in data.examples) == {True: 6, False: 5}
    assert data.dropped == {"over max_per_cluster": 94}


def test_a_question_has_only_so_many_examples():
    one = task(1)
    runs = [trajectory(one, [call(f"1 + 1 + {n} * 0"), result("2"), say("2")], id=f"traj_{n}") for n in range(4)]
    data = made_of(snapshot(*[(one, run) for run in runs]), ["successes"], max_per_task=2)
    assert len(data.examples) == 2
    assert data.dropped == {"over max_per_task": 2}
    assert data.left == [], "the question was taught"


def test_a_correction_equal_to_an_own_success_is_one_example_and_the_first_recipes():
    one = task(1)
    good = trajectory(one, solve(1, "random_id"), id="traj_good")
    bad = trajectory(one, [say("9")], 0.0, id="traj_bad")
    data = made_of(snapshot((one, good), (one, bad), said=[correction(bad, solve(1))]), ["corrections", "successes"])
    assert data.counts == {"corrections": 1}
    assert data.dropped == {"duplicate": 1}


def test_an_unknown_recipe_and_too_little_experience_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="unknown recipe"):
        made_of(corrected([1]), ["magic"])
    with pytest.raises(NotEnoughExperienceError, match="only 3 examples to learn from, 8 needed"):
        made_of(corrected(range(3)), min_examples=8, memory=OneRun())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task_id": "task_none"}, "task not in the snapshot"),
        ({"messages": solve(1)}, "does not begin with its task"),
        ({"messages": [*task(1).messages, say("2", name=RECALLED)]}, "holds recalled or system messages"),
        ({"messages": task(1).messages}, "does not end with an assistant turn"),
        ({"messages": [*task(1).messages, say("?", name="malformed"), say("2")]}, "holds an unreadable turn"),
        ({"messages": [*task(1).messages, {"role": "assistant", "tool_calls": [{}]}]}, "cannot be rendered"),
        ({"kind": "dpo", "chosen": [say("2")]}, "a pair's sides must begin and end with an assistant turn"),
        ({"kind": "dpo", "chosen": [say("2")], "rejected": [say("2", name="x")]}, "both sides say the same"),
        (
            {"messages": [*task(1).messages, PARSED, result("2"), say("2")]},
            "a tool call's arguments are not a JSON string",
        ),
    ],
)
def test_what_an_installed_recipe_gets_wrong_is_left_out_and_counted(monkeypatch, change, reason):
    right = {"recipe": "mine", "kind": "sft", "task_id": "task_0001", "tools": ["calculator"]}
    wrong = Example(**{**right, "messages": task(1).messages + solve(1), **change})
    # A registry entry stands in for an installed package's entry point.
    monkeypatch.setitem(RECIPES, "mine", lambda _snapshot: [wrong])
    data = made_of(corrected([1]), ["corrections", "mine"])
    assert data.dropped == {reason: 1}


def test_the_files_hold_the_examples_and_the_manifest_says_what_they_are(tmp_path):
    data = made_of(corrected(range(10)), ["corrections", "contrast"], OneRun())
    manifest = write(data, tmp_path / "nights" / "data")
    folder = tmp_path / "nights" / "data"
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    assert [Example.model_validate(row) for row in rows] == [e for e in data.examples if e.kind is ExampleKind.SFT]
    assert {name: file.rows for name, file in manifest.files.items()} == {"sft.jsonl": 20, "dpo.jsonl": 10}
    assert manifest.counts == {"contrast": 10, "corrections": 10}
    assert manifest.with_memory == 20
    assert len(manifest.sources) == 20
    assert read_manifest(folder) == manifest
    assert [path.name for path in folder.parent.iterdir()] == ["data"], "nothing temporary is left"


def test_example_ids_come_from_the_content():
    first, second = (made_of(corrected(range(3)), memory=OneRun()).examples for _ in range(2))
    assert [e.id for e in first] == [e.id for e in second]
    assert len({e.id for e in first}) == 6


def test_a_row_stays_one_line_whatever_characters_a_text_holds(tmp_path):
    one = task(1, "line\u2028separator \x85 and \x1c more")
    made = made_of(snapshot((one, trajectory(one, solve(1)))), ["successes"])
    write(made, tmp_path / "data")
    assert len((tmp_path / "data" / "sft.jsonl").read_text().splitlines()) == 1


def test_writing_the_same_dataset_again_is_a_no_op_and_another_one_a_conflict(tmp_path):
    folder = tmp_path / "data"
    manifest = write(made_of(corrected(range(3))), folder)
    assert write(made_of(corrected(range(3))), folder) == manifest
    with pytest.raises(ConflictError, match="another folder"):
        write(made_of(corrected(range(4))), folder)
    (folder / "sft.jsonl").write_text("damaged")
    assert read_manifest(folder) is None
    with pytest.raises(ConflictError):
        write(made_of(corrected(range(3))), folder)


def test_what_a_killed_writer_left_behind_is_replaced(tmp_path):
    partial = tmp_path / ".data.partial"
    partial.mkdir()
    (partial / "sft.jsonl").write_text("half a li")
    write(made_of(corrected(range(3))), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_disk_that_refuses_is_a_training_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="check the disk"):
        write(made_of(corrected(range(3))), tmp_path / "file" / "data")


def test_the_dataset_carries_how_its_newest_runs_were_served_and_none_of_what_is_held_out(tmp_path):
    made = [
        (
            one,
            trajectory(
                one, solve(n), steps=[Step(message=2, prompt_token_ids=[n, 7], token_ids=[8, 9], finish_reason="stop")]
            ),
        )
        for n in range(1, 5)
        for one in [task(n)]
    ]
    elsewhere = (task(9), trajectory(task(9), solve(9), steps=[Step(message=2)]))
    data = made_of(snapshot(*made, elsewhere, held_out_tasks=[task(2, id="suite")]), ["successes"])
    assert [(s.trajectory, s.prompt_token_ids, s.end_token_id) for s in data.served] == [
        (f"traj_task_000{n}", [n, 7], 9) for n in (1, 3, 4)
    ]
    assert data.served[0].messages == [SYSTEM, *task(1).messages]
    folder = tmp_path / "data"
    manifest = write(data, folder)
    assert manifest.served is not None
    assert (manifest.served.rows, "served.jsonl" in manifest.files) == (3, False)
    (folder / "served.jsonl").write_text("damaged")
    assert read_manifest(folder) is None


def test_a_tool_calls_arguments_stay_the_json_string_that_they_were(tmp_path):
    write(made_of(corrected([1])), tmp_path / "data")
    (row,) = [json.loads(line) for line in (tmp_path / "data" / "sft.jsonl").read_text().splitlines()]
    assert row["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"expression": "1 + 1"}'
