"""Over the API: what memory withholds now and then measures it; nights retire what hurts and put by what is known."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agent.llm import ChatRequest
from evals.chat import chat_suite
from evals.suites import save_suite
from memory.recall import RecallConfig
from memory.records import text_of
from serve.client import Client
from serve.settings import NightConfig
from tests.memory import samples
from tests.serve import test_loop
from tests.serve.fakes import running, settings_in

RUNS = 48


class Pupil:
    """Is misled by what it is told of trains; knows about tea by itself, until it has forgotten."""

    forgotten = False

    def __call__(self, request: ChatRequest) -> str:
        said = "\n".join(text_of(message) for message in request.messages)
        if "Rome" in said:
            return "Action: finish(9)"
        return (
            "Action: finish(9)" if self.forgotten and "tea" in said and "Lapsang" not in said else "Action: finish(3)"
        )


def ask(client: Client, question: str) -> list[dict[str, Any]]:
    """What was recalled for it."""
    messages = [{"role": "user", "content": question}]
    body = {"model": "nightschool", "messages": messages, "nightschool": {"reference": "3"}}
    return client.post("/v1/chat/completions", body)["nightschool"]["recalled"]


def ask_often(client: Client, question: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: ask(client, question.format(n)), range(RUNS)))


def sleep(client: Client) -> dict[str, dict[str, Any]]:
    """A night that finds too little to train on has done memory's part all the same: the table of worths, by item."""
    assert test_loop.sleep_through(client)["nightschool"]["status"] == "skipped"
    return {row["id"]: row for row in client.get("/v1/memory/stats")["worths"]}


def test_an_item_that_hurts_retires_and_one_that_is_known_leaves_the_prompt_until_it_is_forgotten(
    tmp_path: Path,
) -> None:
    night = NightConfig(min_examples=10_000, principles=0)
    recall = RecallConfig(runs=0, principles=1, withhold_share=0.5)
    settings = settings_in(tmp_path, night=night, recall=recall)
    for suite in (test_loop.HELD_OUT, chat_suite()):
        save_suite(suite, settings.suites_dir / f"{suite.name}.jsonl")
    pupil = Pupil()
    with running(settings, pupil) as (url, services):
        client = Client(url)
        train = samples.principle("The train to Rome takes nine hours, and so does every train to every place.")
        tea = samples.principle("A cup of Lapsang tea draws for three minutes, and so does every cup of tea.")
        for item in (train, tea):
            services.ledger.add_principle(item)
        client.post("/v1/memory/reindex", {})
        ask_often(client, "How many hours does the train to place {} take?")
        ask_often(client, "How many minutes does a cup of tea number {} draw?")
        table = sleep(client)
        assert table[train.id]["shown"]["successes"] == 0
        assert table[train.id]["withheld"]["successes"] == table[train.id]["withheld"]["runs"] > 10
        assert table[train.id]["uplift"]["high"] < 0
        assert table[train.id]["status"] == "retired"
        assert table[tea.id]["uplift"]["low"] <= 0 <= table[tea.id]["uplift"]["high"]
        assert table[tea.id]["status"] == "internalised"
        [noted] = ask(client, "How many minutes does a cup of tea draw?")
        assert (noted["id"], noted["withheld"]) == (tea.id, True)

        pupil.forgotten = True
        ask_often(client, "How many minutes does a cup of tea number {} draw, please?")
        assert sleep(client)[tea.id]["status"] == "active"
