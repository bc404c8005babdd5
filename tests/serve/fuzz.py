"""Schemathesis over our own OpenAPI document: no 5xx, and every reply as the document says.

`python -m tests.serve.fuzz --cases 5000` (`make fuzz`) starts the app with the scripted model and goes on until so
many requests were sent, a round over all operations at a time: some 70 to 110 requests each, however small `--cases`
is, and nothing is printed before the first round is over. The suite does the same with fewer (`test_schema.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from agent.llm import ChatRequest
from memory import keys
from tests.serve.fakes import running, settings_in

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@dataclass(frozen=True)
class Report:
    """What Schemathesis sent and found."""

    cases: int
    failures: list[str]
    output: str


def pupil(request: ChatRequest) -> str:
    """Answers every prompt at once."""
    return "Action: finish(3)" if request.regex else "Three."


def fuzz(
    url: str,
    key: str,
    folder: Path,
    *,
    per_operation: int,
    seed: int,
    phases: str = "examples,coverage,fuzzing",
    only: str | None = None,
) -> Report:
    """Send generated requests to every operation (of the paths `only`), `per_operation` in the fuzzing phase."""
    events = folder / f"events-{seed}.ndjson"
    command = [
        str(Path(sys.executable).with_name("st")),
        *("run", f"{url}/openapi.json", "--no-color", "--phases", phases),
        *("--checks", ",".join(CHECKS), "--max-examples", str(per_operation), "--seed", str(seed)),
        *("--header", f"Authorization: Bearer {key}", "--suppress-health-check", "all", "--request-timeout", "30"),
        *("--report", "ndjson", "--report-ndjson-path", str(events), "--warnings", "off", "--continue-on-failure"),
        # Schemathesis has no serializer for lines of JSON; the import has tests of its own.
        *("--exclude-path", "/v1/memory/import"),
        *(("--include-path-regex", only) if only else ()),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if not events.exists():
        return Report(0, [f"Schemathesis did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}"], done.stdout)
    return _read(events, done.stdout, done.returncode)


def _read(events: Path, output: str, code: int) -> Report:
    cases, failures = 0, []
    for line in events.read_text(encoding="utf-8").splitlines():
        finished = json.loads(line).get("ScenarioFinished")
        if finished is None:
            continue
        recorder = finished["recorder"]
        cases += len(recorder.get("interactions", {}))
        for checks in recorder.get("checks", {}).values():
            failures += [
                f"{c['name']}: {json.dumps(c['failure_info'])[:2000]}" for c in checks if c.get("failure_info")
            ]
    if code and not failures:
        failures = [output[-3000:]]
    return Report(cases, failures, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--per-operation", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="regular expression of paths")
    given = parser.parse_args()
    cases, seed, failures = 0, given.seed, set[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with running(settings_in(folder), pupil) as (url, services):
            key = keys.mint(services.ledger.database, keys.ApiKey(name="fuzz", scopes=[keys.Scope.ADMIN]))
            while cases < given.cases:
                report = fuzz(url, key, folder, per_operation=given.per_operation, seed=seed, only=given.only)
                failures |= set(report.failures)
                if not report.cases:
                    break
                cases, seed = cases + report.cases, seed + 1
                print(f"{cases} cases, {len(failures)} failures", flush=True)
                if report.failures:
                    print(report.output)
                    break
    sys.exit(1 if failures or cases < given.cases else 0)


if __name__ == "__main__":
    main()
