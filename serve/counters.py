"""What this process counts for Prometheus: requests, runs, tokens, what went to a teacher, what was practised.

Labels are routes, numbers and our own words: never a tenant, a user, a key or a text.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

from memory.escalations import Escalation, Status
from memory.records import Purpose, Trajectory

COUNTED = CollectorRegistry()
"""Of the process since its start, whatever service runs in it."""

REQUESTS = Counter(
    "nightschool_requests", "Requests by route and status.", ["method", "route", "status"], registry=COUNTED
)
LATENCY = Histogram(
    "nightschool_request_seconds",
    "From a request's arrival to its reply's last byte.",
    ["method", "route"],
    registry=COUNTED,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
RUNS = Counter(
    "nightschool_runs",
    "Runs by outcome, by who ran them (own, teacher) and by the generation that was asked.",
    ["generation", "outcome", "by"],
    registry=COUNTED,
)
TOKENS = Counter("nightschool_tokens", "Tokens of those runs.", ["kind"], registry=COUNTED)
RECALLED = Counter("nightschool_recalled_items", "Memory items shown to runs, by kind.", ["kind"], registry=COUNTED)
RECALLING = Counter("nightschool_runs_with_recall", "Runs that were shown something from memory.", registry=COUNTED)
ESCALATIONS = Counter(
    "nightschool_escalations",
    "Tasks that went to a teacher, by the generation that they were taken from, why, and how that went.",
    ["generation", "reason", "outcome"],
    registry=COUNTED,
)
ESCALATION_TOKENS = Counter(
    "nightschool_escalation_tokens", "Tokens of the teacher's runs.", ["generation"], registry=COUNTED
)
ESCALATION_COST = Counter(
    "nightschool_escalation_cost_dollars",
    "What the teacher's runs cost, where a price is known.",
    ["generation"],
    registry=COUNTED,
)
PRACTISED = Counter(
    "nightschool_practised_tasks",
    "Earlier tasks that nights tried again, by generation and by whether a try solved them.",
    ["generation", "outcome"],
    registry=COUNTED,
)


def ran(trajectory: Trajectory) -> None:
    """Count a run that was committed."""
    judged = trajectory.outcome is not None
    outcome = "success" if trajectory.success else "failure" if judged else "unjudged"
    by = "teacher" if trajectory.purpose is Purpose.TEACHER else "own"
    RUNS.labels(str(trajectory.generation), outcome, by).inc()
    own = trajectory.steps[trajectory.inherited_steps :]
    TOKENS.labels("prompt").inc(sum(step.prompt_tokens or 0 for step in own))
    TOKENS.labels("completion").inc(sum(step.completion_tokens or 0 for step in own))
    shown = [item for item in trajectory.recalled if not item.withheld]
    for item in shown:
        RECALLED.labels(item.kind.value).inc()
    if shown:
        RECALLING.inc()


def escalated(ended: Escalation) -> None:
    """Count a task that went to a teacher and came back."""
    generation = str(ended.generation)
    judged = {None: "unjudged", True: "success", False: "failure"}[ended.success]
    outcome = judged if ended.status is Status.ANSWERED else ended.status.value
    ESCALATIONS.labels(generation, ended.reason.value, outcome).inc()
    ESCALATION_TOKENS.labels(generation).inc(ended.tokens)
    ESCALATION_COST.labels(generation).inc(ended.cost_usd or 0.0)


def practised(tries: Iterable[Trajectory]) -> None:
    """Count the tasks of a night's practice; one is solved by any try that succeeded."""
    solved: dict[tuple[str, str], bool] = {}
    for run in tries:
        task = (str(run.generation), run.task_id)
        solved[task] = solved.get(task, False) or run.success
    for (generation, _), success in solved.items():
        PRACTISED.labels(generation, "solved" if success else "unsolved").inc()
