"""What is recalled, what is not, and that the index is only a shortcut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from memory import uses
from memory.embed import Embedder
from memory.errors import ConfigError, IndexUnavailableError
from memory.index import Index, sync
from memory.ledger import Ledger
from memory.recall import Asked, Memory, NoMemory, Recall, RecallConfig, Recaller, estimate_tokens, withhold
from memory.records import MemoryKind, MemoryStatus, PrincipleKind, Recalled
from memory.uses import Use
from tests.memory import samples

Opener = Callable[..., Recaller]
"""Takes the settings of a `RecallConfig`."""

ASKED = "How many legs do 7 cows and 2 hens have?"


@pytest.fixture
def index(tmp_path: Path, embedder: Embedder) -> Iterator[Index]:
    opened = Index.open(tmp_path / "chroma", embedder)
    yield opened
    opened.close()


@pytest.fixture(params=["index", "scan"])
def memory(request: pytest.FixtureRequest, sqlite_ledger: Ledger, index: Index, embedder: Embedder) -> Opener:
    """Recall by a real index that follows the ledger, and by a scan without one."""

    def make(**config: float) -> Recaller:
        settings = RecallConfig.model_validate(config)
        if request.param == "scan":
            return Memory(sqlite_ledger, None, settings, embedder)
        sync(sqlite_ledger, index)
        return Memory(sqlite_ledger, index, settings)

    return make


def test_the_nearest_run_is_recalled_with_its_reasons(sqlite_ledger: Ledger, memory: Opener):
    samples.remember(sqlite_ledger, "Sort these words by length.")
    cows = samples.remember(sqlite_ledger, "How many legs do 4 cows and 3 hens have?")
    recall = memory().recall(samples.task(ASKED))
    assert recall.runs == [cows]
    (item,) = recall.items
    assert (item.id, item.kind, item.score) == (cows.id, MemoryKind.RUN, 0.5)
    assert item.similarity > 0.8
    assert item.recency == pytest.approx(1.0, abs=0.01)
    assert item.rank == pytest.approx(0.7 * item.similarity + 0.2 * item.score + 0.1 * item.recency)
    assert item.tokens == estimate_tokens(cows)
    assert "not used yet" in item.why


def test_nothing_near_means_nothing_recalled(sqlite_ledger: Ledger, memory: Opener):
    assert memory().recall(samples.task(ASKED)) == Recall()
    samples.remember(sqlite_ledger, "Sort these words by length.")
    assert memory(min_similarity=0.6).recall(samples.task(ASKED)) == Recall()
    assert memory().recall(samples.task(" ")) == Recall()
    assert NoMemory().recall(samples.task(ASKED)) == Recall()


def test_a_retired_item_is_not_recalled_even_before_the_index_hears_of_it(sqlite_ledger: Ledger, memory: Opener):
    cows = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    recaller = memory()
    sqlite_ledger.set_memory_status(cows.id, MemoryStatus.RETIRED, "it misled")
    assert recaller.recall(samples.task(ASKED)) == Recall()


def test_a_tenant_never_sees_anothers_items(sqlite_ledger: Ledger, memory: Opener):
    mine = samples.remember(sqlite_ledger, "How many legs do 4 cows have?", tenant="ada")
    samples.remember(sqlite_ledger, ASKED + " Now!", tenant="bob")
    recaller = memory(runs=9)
    assert recaller.recall(samples.task(ASKED, tenant="ada")).runs == [mine]
    assert recaller.recall(samples.task(ASKED, tenant="eve")) == Recall()


def test_an_item_made_from_the_task_itself_or_an_excluded_one_is_left_out(sqlite_ledger: Ledger, memory: Opener):
    task = samples.task(ASKED)
    other = samples.task("How many legs do 4 cows have?")
    for made_from in (task, other):
        sqlite_ledger.add_task(made_from)
        sqlite_ledger.add_past_run(samples.past_run(made_from))
    recaller = memory(runs=9)
    assert [run.task_id for run in recaller.recall(task).runs] == [other.id]
    assert recaller.recall(task, exclude_task_ids=frozenset({other.id})) == Recall()
    assert recaller.recall(task, exclude_fingerprints=frozenset({other.fingerprint})) == Recall()


@pytest.mark.parametrize("system", ["", "You are a calculator."])
def test_the_same_question_under_another_id_is_left_out(sqlite_ledger: Ledger, memory: Opener, system: str):
    samples.remember(sqlite_ledger, ASKED)
    again = samples.task(f" {ASKED}\n")
    if system:
        again = again.model_copy(update={"messages": [{"role": "system", "content": system}, *again.messages]})
    assert memory().recall(again) == Recall()


def test_a_principle_made_from_an_excluded_task_is_left_out(sqlite_ledger: Ledger, memory: Opener):
    task = samples.task("How many legs do 4 cows have?")
    run = samples.trajectory(task)
    sqlite_ledger.add_task(task)
    sqlite_ledger.add_trajectory(run)
    learned = samples.principle("A cow has 4 legs and a hen has 2 legs.", sources=[run.id])
    sqlite_ledger.add_principle(learned)
    recaller = memory(runs=0, principles=2)
    assert recaller.recall(samples.task(ASKED)).principles == [learned]
    assert recaller.recall(samples.task(ASKED), exclude_task_ids=frozenset({task.id})) == Recall()


def test_exclusions_of_many_near_items_do_not_hide_the_allowed_one(sqlite_ledger: Ledger, memory: Opener):
    barred = [samples.remember(sqlite_ledger, f"{ASKED} Really? {i}") for i in range(40)]
    allowed = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    excluded = frozenset(run.task_id for run in barred)
    assert memory().recall(samples.task(ASKED), exclude_task_ids=excluded).runs == [allowed]


def test_the_budget_and_the_limits_hold_over_both_kinds(sqlite_ledger: Ledger, memory: Opener):
    long = samples.remember(sqlite_ledger, ASKED + " Think of every cow and every hen." * 30)
    short = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    rule = samples.principle("A cow has 4 legs and a hen has 2 legs.")
    sqlite_ledger.add_principle(rule)
    wide = memory(runs=2, principles=1, token_budget=1000).recall(samples.task(ASKED))
    assert {run.id for run in wide.runs} == {long.id, short.id}
    assert wide.principles == [rule]
    assert [item.rank for item in wide.items] == sorted((item.rank for item in wide.items), reverse=True)
    narrow = memory(runs=2, principles=1, token_budget=60).recall(samples.task(ASKED))
    assert narrow.runs == [short]
    assert sum(item.tokens for item in narrow.items) <= 60


def test_of_two_equally_near_items_the_one_that_worked_comes_first(sqlite_ledger: Ledger, memory: Opener):
    good, bad = (samples.remember(sqlite_ledger, f"How many legs do {n} cows have?") for n in ("4", "4"))
    sqlite_ledger.credit_use(good.id, True, "traj_1")
    sqlite_ledger.credit_use(bad.id, False, "traj_2")
    recall = memory().recall(samples.task(ASKED))
    assert [run.id for run in recall.runs] == [good.id]
    assert "succeeded in 1 of 1 uses" in recall.items[0].why


def test_of_two_equally_near_items_the_newer_one_comes_first(sqlite_ledger: Ledger, memory: Opener):
    question = "How many legs do 4 cows have?"
    young = samples.past_run(samples.task(question))
    old = samples.past_run(samples.task(question))
    old = old.model_copy(update={"created_at": young.created_at - timedelta(days=30)})
    for run in (old, young):
        sqlite_ledger.add_past_run(run)
    recall = memory(runs=2, max_overlap=1.0).recall(samples.task(ASKED))
    assert [run.id for run in recall.runs] == [young.id, old.id]
    assert recall.items[1].recency == pytest.approx(0.5, abs=0.01)


def test_the_same_task_recalls_the_same_later(sqlite_ledger: Ledger, memory: Opener):
    for n in range(5):
        samples.remember(sqlite_ledger, f"How many legs do {n} cows have?")
    task = samples.task(ASKED)
    recaller = memory(runs=3)
    assert recaller.recall(task) == recaller.recall(task)


def test_a_scan_gives_what_the_index_gives(sqlite_ledger: Ledger, index: Index, embedder: Embedder):
    animals = ("cows", "hens", "spiders", "ants", "geese")
    for n in range(60):
        samples.remember(sqlite_ledger, f"How many legs do {n} {animals[n % 5]} have on day {n * n}?")
        sqlite_ledger.add_principle(samples.principle(f"Rule {n}: count the legs of {animals[n % 5]} first."))
    sync(sqlite_ledger, index)
    config = RecallConfig(runs=5, principles=5, token_budget=2000)
    by_index, by_scan = Memory(sqlite_ledger, index, config), Memory(sqlite_ledger, None, config, embedder)
    for question in (ASKED, "Count the legs of 5 spiders.", "What has ants on day 3?"):
        task = samples.task(question)
        one, other = by_index.recall(task), by_scan.recall(task)
        assert [item.id for item in one.items] == [item.id for item in other.items]
        assert [i.similarity for i in one.items] == pytest.approx([i.similarity for i in other.items], abs=1e-5)


def test_recall_goes_on_when_the_index_cannot_answer(sqlite_ledger: Ledger, index: Index):
    cows = samples.remember(sqlite_ledger, "How many legs do 4 cows have?")
    recaller = Memory(sqlite_ledger, index, RecallConfig())
    with pytest.raises(IndexUnavailableError):
        index.query(MemoryKind.RUN, "default", ASKED, 1)
    assert recaller.recall(samples.task(ASKED)).runs == [cows]
    sync(sqlite_ledger, index)
    assert recaller.recall(samples.task(ASKED)).runs == [cows]


def test_a_memory_without_index_and_embedder_is_refused(sqlite_ledger: Ledger):
    with pytest.raises(ConfigError, match="needs an embedder"):
        Memory(sqlite_ledger, None, RecallConfig())


def test_an_item_that_repeats_a_better_one_makes_room_for_another(sqlite_ledger: Ledger, memory: Opener):
    first = samples.remember(sqlite_ledger, "How many legs do 7 cows have, and 2 hens?")
    samples.remember(sqlite_ledger, "How many legs do 7 cows have and 2 hens?")
    other = samples.remember(sqlite_ledger, "Count the legs of 3 spiders.")
    sqlite_ledger.credit_use(first.id, True, "traj_1")
    assert memory(runs=2, min_similarity=0.1).recall(samples.task(ASKED)).runs[1] == other


def exposed(ledger: Ledger, item_id: str, shown: tuple[int, int], withheld: tuple[int, int]) -> None:
    told = [Use(item_id, f"shown_{n}", n < shown[1]) for n in range(shown[0])]
    told += [Use(item_id, f"withheld_{n}", n < withheld[1], withheld=True) for n in range(withheld[0])]
    with ledger.database.writing() as connection:
        uses.count(connection, told, tenant="default")


def test_measured_uplift_enters_the_rank_once_both_sides_have_enough_runs(sqlite_ledger: Ledger, memory: Opener):
    good, bad = (samples.remember(sqlite_ledger, f"How many legs do {n} cows have?") for n in ("4", "5"))
    exposed(sqlite_ledger, good.id, (10, 5), (10, 0))
    exposed(sqlite_ledger, bad.id, (10, 5), (10, 10))
    recall = memory(max_overlap=1.0, runs=2).recall(samples.task(ASKED))
    assert [run.id for run in recall.runs] == [good.id, bad.id]
    assert recall.items[0].uplift == pytest.approx(0.25)
    assert recall.items[1].uplift == pytest.approx(-0.25)
    assert "uplift +0.50 (+0.12 to +0.76)" in recall.items[0].why
    unmeasured = memory(max_overlap=1.0, runs=2, min_exposures=11).recall(samples.task(ASKED))
    assert [item.uplift for item in unmeasured.items] == [None, None]
    assert "uplift" not in unmeasured.items[0].why


def test_an_internalised_item_is_noted_but_not_shown_and_takes_nobodys_place(sqlite_ledger: Ledger, memory: Opener):
    known = samples.remember(sqlite_ledger, "How many legs do 7 cows have?")
    next_best = samples.remember(sqlite_ledger, "How many legs do 3 ants have?")
    sqlite_ledger.set_memory_status(known.id, MemoryStatus.INTERNALISED, "learned")
    recall = memory().recall(samples.task(ASKED))
    assert [item.id for item in recall.items] == [next_best.id]
    assert [(item.id, item.withheld) for item in recall.withheld] == [(known.id, True)]


def test_what_is_withheld_follows_from_run_and_item_and_comes_to_the_share():
    runs = [samples.past_run(samples.task(f"Question number {n}?")) for n in range(4)]
    number = {"similarity": 1.0, "score": 0.5, "recency": 1.0, "rank": 1.0, "tokens": 9, "why": "near"}
    items = [Recalled(id=run.id, kind=MemoryKind.RUN, **number) for run in runs]
    recall = Recall(items=items, runs=runs)
    missing = 0
    for n in range(1000):
        less = withhold(recall, f"traj_{n}", 0.1)
        assert less == withhold(recall, f"traj_{n}", 0.1)
        assert [item.id for item in less.items] == [run.id for run in less.runs]
        assert {i.id for i in less.items} | {i.id for i in less.withheld} == {run.id for run in runs}
        assert all(item.withheld for item in less.withheld)
        assert not any(item.withheld for item in less.items)
        missing += len(less.withheld)
    assert 320 < missing < 480
    assert withhold(recall, "traj_1", 0.0) == recall
    assert withhold(recall, "traj_1", 1.0).items == []


def test_neighbours_are_of_the_same_tenant_and_kind_and_retired_ones_are_among_them(
    sqlite_ledger: Ledger, index: Index
):
    text = "A cow has 4 legs and a hen has 2 legs."
    same, retired = samples.principle(f"{text} Always."), samples.principle(f"Remember: {text}")
    warning = samples.principle(text).model_copy(update={"kind": PrincipleKind.CAUTIONARY})
    for item in (same, retired, warning, samples.principle(text, "ada"), samples.principle("Sort words by length.")):
        sqlite_ledger.add_principle(item)
    sqlite_ledger.set_memory_status(retired.id, MemoryStatus.RETIRED, "it misled")
    new = samples.principle(text)
    sqlite_ledger.add_principle(new)
    sync(sqlite_ledger, index)
    recaller = Memory(sqlite_ledger, index, RecallConfig())
    near = recaller.neighbours(new, at_least=0.85, k=3)
    assert {item.id for item in near} == {same.id, retired.id}
    assert recaller.neighbours(new, at_least=0.85, k=1) == near[:1]
    assert recaller.neighbours(samples.principle(text, "eve"), at_least=0.0, k=3) == []


def test_what_the_agent_asks_is_searched_by_its_words_less_what_it_met_and_what_was_made_from_its_task(
    sqlite_ledger: Ledger, memory: Opener
):
    task = samples.task(ASKED)
    own = samples.remember(sqlite_ledger, ASKED)
    ducks = samples.remember(sqlite_ledger, "How many legs do 5 ducks have?")
    rule = samples.principle("Multiply the legs of each animal by how many there are.")
    sqlite_ledger.add_principle(rule)
    recaller = memory(asked_runs=2, asked_principles=1)
    for query in (ASKED, "counting the legs of animals"):
        found = recaller.recall(task, asked=Asked(query))
        assert {item.id for item in found.items} == {ducks.id, rule.id}
        assert own.id not in str(found)
    known = frozenset({ducks.id})
    assert [item.id for item in recaller.recall(task, asked=Asked(ASKED, known)).items] == [rule.id]
    assert [item.id for item in recaller.recall(task).items] == [ducks.id]
    assert recaller.recall(task, asked=Asked(" ")) == Recall()
