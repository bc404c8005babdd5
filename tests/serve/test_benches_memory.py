"""The benchmarks of memory on tiny sizes, without peers and without an engine."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.llm import ChatRequest, ScriptedModel
from agent.run import ModelRef
from agent.state import AgentDeps
from evals.labelled import Labelled, family_sets, gsm8k, word_problems
from evals.retrieval import by_fts5, by_vectors, compare, fused, search_all
from evals.suites import TRAINED_FAMILIES, reasoning_gym_suite, reasoning_gym_tasks
from memory.embed import load_embedder
from memory.errors import ConfigError, EngineError
from memory.ledger import Ledger
from memory.recall import Memory, RecallConfig
from memory.records import text_of
from serve.benches import benches
from serve.benches import recall as benches_recall
from serve.benches.retrieval import retrieval
from serve.benches.usefulness import AllMemory, compare_memories, fill_memory
from serve.engine import ROOT
from tests.serve.fakes import settings_in

FEW = {family: TRAINED_FAMILIES[family] for family in ("gcd", "letter_counting")}
TINY = Labelled(
    "tiny",
    [("fruit", "a red apple"), ("tool", "a steel hammer"), ("fruit", "a yellow banana")],
    [("tool", "hammer and nails"), ("fruit", "an apple a day"), ("none", "hammer")],
)


def test_the_first_right_text_is_what_counts() -> None:
    found = search_all(TINY, by_fts5([text for _, text in TINY.stored]))
    assert found.ranks == [1, 1, None]
    assert found.reciprocal == [1.0, 1.0, 0.0]
    assert found.recall(1).startswith("0.667 [0.2")
    assert found.mrr().startswith("0.667 [0.0")


def test_the_first_right_text_may_stand_later() -> None:
    found = search_all(TINY, lambda _: [0, 2, 1])
    assert found.ranks == [3, 1, None]
    assert (found.recall(1)[:5], found.recall(5)[:5]) == ("0.333", "0.667")


def test_lexical_search_leaves_out_what_has_no_word_in_common() -> None:
    rank = by_fts5(["count the letters", "invert a matrix", "letters"])
    assert rank('How many LETTERS are in "NEAR OR NOT"?') == [2, 0]
    assert rank("?!") == []


def test_what_two_rankings_favour_comes_first() -> None:
    assert fused(lambda _: [0, 1, 2], lambda _: [1, 3])("any") == [1, 0, 3, 2]


def test_vectors_find_words_that_are_only_akin(tmp_path: Path) -> None:
    rank = by_vectors(["Invert a matrix.", "Count the legs of cows."], load_embedder("wordllama", tmp_path))
    assert rank("How many feet do cattle have?")[0] == 1


def test_labelled_questions_that_are_asked_are_not_stored() -> None:
    for labelled in [*family_sets(2, 2, FEW), word_problems(120, 12)]:
        stored = {text for _, text in labelled.stored}
        assert labelled.asked
        assert not {text for _, text in labelled.asked} & stored
        assert {kind for kind, _ in labelled.asked} <= {kind for kind, _ in labelled.stored}
        assert 0 < labelled.chance < 1


def test_word_problems_of_gsm8k_are_labelled_by_their_operations(tmp_path: Path) -> None:
    assert gsm8k(tmp_path) is None
    answer = "Half is <<48/2=24>>24, with the others <<24 + 48=72>>72.\n#### 72"
    rows = [{"question": f"Problem {i}?", "answer": answer} for i in range(5)]
    odd = {"question": "Another?", "answer": "<<2*-3=-6>>\n#### -6"}
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, odd]))
    labelled = gsm8k(tmp_path)
    assert labelled is not None
    assert {kind for kind, _ in labelled.stored} == {"/+", "*"}
    assert {kind for kind, _ in labelled.asked} == {"/+"}
    (tmp_path / "dev.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"dev\.jsonl is not GSM8K's"):
        gsm8k(tmp_path)


def test_retrieval_shows_every_way_with_an_interval_and_names_what_it_skips(tmp_path: Path) -> None:
    figures = retrieval(settings_in(tmp_path), per_family=1, problems=90).figures
    interval = re.compile(r"[01]\.\d{3} \[[01]\.\d{3}, [01]\.\d{3}\]")
    for name in ("runs", "principles", "word_problems"):
        for way in ("wordllama", "fts5", "wordllama+fts5"):
            for measure in ("recall@1", "recall@5", "mrr"):
                assert interval.fullmatch(str(figures[f"{name}_{way}_{measure}"]))
        assert f"{name}_wordllama+fts5_gain_points" in figures
    assert str(figures["gsm8k_skipped"]).startswith("no train.jsonl")
    assert str(figures["runs_wordllama_recall@5"]) > "0.8"


def test_an_embedder_of_no_sense_is_no_better_than_chance(tmp_path: Path) -> None:
    class Blind:
        name, dimensions = "blind", 2

        def embed(self, texts: list[str]) -> list[list[float]]:
            return [[1.0, 0.0] for _ in texts]

    labelled, _ = family_sets(4, 4)
    blind = compare(labelled, {"blind": Blind()})
    assert float(str(blind["runs_blind_recall@1"])[:5]) == pytest.approx(labelled.chance, abs=0.001)


def test_recall_measures_ours_at_every_size(tmp_path: Path) -> None:
    done = benches_recall.recall(settings_in(tmp_path), sizes=(150, 300), peers=(), rounds=2, queries=5)
    for size in (150, 300):
        assert done.figures[f"ours_stored_at_{size}"] == size
        assert float(done.figures[f"ours_recall@5_at_{size}"]) >= 0.99
        for figure in ("p50_ms", "p99_ms", "cpu_ms", "writes_per_s", "bulk_writes_per_s", "rss_mib", "disk_mib"):
            assert float(done.figures[f"ours_{figure}_at_{size}"]) > 0
    assert float(done.figures["ours_rebuild_s_at_300"]) > 0
    assert set(done.met) == {"ours_p99_ms_at_300", "ours_recall@5_at_300"}


def test_a_store_that_is_late_is_measured_as_full_as_it_is(tmp_path: Path) -> None:
    done = benches_recall.recall(settings_in(tmp_path), sizes=(600, 700), peers=(), rounds=1, queries=3, fill_s=0.02)
    stored = done.figures["ours_stored_at_700"]
    assert 0 < int(stored) < 600
    assert done.figures["ours_stored_at_600"] == stored


def test_a_store_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as errors:
        command = [sys.executable, "-c", "import sys; print('starting'); sys.exit('out of luck')"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, text=True, **pipes)
    each = benches_recall.Contender("unlucky", process, tmp_path, log)
    with pytest.raises(EngineError, match="'unlucky' ended with 1: out of luck"):
        each.do(do="search", k=5, budget_s=1)


def test_the_peers_scripts_are_no_part_of_the_service() -> None:
    script = "import sys, serve.cli, serve.benches; print([m for m in ('mem0', 'langmem') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_usefulness_compares_none_all_and_ours_on_the_same_tasks(tmp_path: Path) -> None:
    """A model that can only do what it sees a past run of the same kind do."""
    taught = reasoning_gym_tasks(FEW, 3, 101)
    suite = reasoning_gym_suite(FEW, 4, 70_001, "held_out", "held_out")
    answers = {task.task.question: str(task.task.reference) for task in suite.tasks}
    seen: dict[str, list[int]] = {"gcd": [], "letter_counting": []}

    def script(request: ChatRequest) -> str:
        question, before = text_of(request.messages[-1]), request.messages[:-1]
        kind = "gcd" if "Greatest" in question or "GCD" in question else "letter_counting"
        runs = [m for m in before if m["role"] == "user" and not text_of(m).startswith("Observation")]
        seen[kind].append(len(runs))
        alike = [m for m in runs if ("GCD" in text_of(m)) == (kind == "gcd")]
        return f"Action: finish({answers[question] if alike else 'unknown'})"

    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    fill_memory(ledger, taught)
    assert ledger.count_active() == 8
    embedder = load_embedder("wordllama", tmp_path)
    ours = Memory(ledger, None, RecallConfig(runs=1), embedder)
    figures = asyncio.run(
        compare_memories(
            ledger,
            ours,
            suite,
            ModelRef(0, "base"),
            AgentDeps(llm=ScriptedModel(script)),
            context=2048,
            concurrency=1,
            forms={"principle": Memory(ledger, None, RecallConfig(runs=0, principles=1), embedder)},
        )
    )
    ledger.close()
    assert (figures["none_success"], figures["ours_success"]) == ("0% [0%, 32%] (0/8)", "100% [68%, 100%] (8/8)")
    assert figures["all_success"] == "100% [68%, 100%] (8/8)"
    assert seen == dict.fromkeys(("gcd", "letter_counting"), [0] * 4 + [6] * 4 + [1] * 4 + [0] * 4)
    assert figures["ours_over_principle_points"] == 100.0
    assert figures["ours_over_none_points"] == 100.0
    assert figures["ours_over_all_points"] == 0.0


def test_all_memory_stops_where_the_context_is_full(tmp_path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    fill_memory(ledger, reasoning_gym_tasks(FEW, 5, 101))
    recall = AllMemory(ledger, "default", 200).recall(reasoning_gym_tasks(FEW, 1, 1)[0])
    ledger.close()
    assert 0 < len(recall.runs) + len(recall.principles) < 12


def test_the_benches_are_offered_by_name(tmp_path: Path) -> None:
    assert {"retrieval", "recall", "usefulness"} <= set(benches(settings_in(tmp_path)))
