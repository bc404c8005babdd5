"""The gate: whether a candidate generation may replace the champion. Pure: records in, decision out.

Owns the rule and its sentences. Owns no running of tasks (`evals.runner`) and no promotion (`serve`).

The rule, with the defaults:

1. Gain. Over all held-out tasks, paired task by task, the one-sided 95% lower bound of the difference
   is above 0 and the exact McNemar test agrees (p < 0.05). The second condition is there because a
   bootstrap of few tasks is too sure of itself: three wins in 24 tasks have a lower bound above 0 and
   p = 0.125. No gain seen at all, identical outcomes included, is `reject`; a gain that is seen and
   not proven is `not_enough_evidence`. One workload learned is no pay for another forgotten: a
   workload that lost more than the margin by the exact test rejects whatever the others gained, and one
   of `min_control_tasks` or more that fell by over `control_slack` margins, proven or not, is
   `not_enough_evidence`. A smaller fall is told.
2. Controls. The design asks that no control's lower bound be under its margin. With 24 tasks and a
   margin of 10 points that refuses nearly every adapter that changed two answers, so a gate that
   could be satisfied would never be tried. Instead each control suite is judged in two steps:
   - an observed net loss above the margin rejects, proven or not. Whoever wants the benefit of the
     doubt must bring more control tasks, not a wider margin. At 24 tasks (three lost net) this
     catches a true loss of 37 points (the spike: chat 7/8 to 4/8) 99.9% of the time, of 20 points
     89%, of 10 points 44%; a harmless change that flips 3% of the answers each way is refused 2% of
     the time, at 40 tasks 0.3%.
   - within the margin, a loss of `control_slack` margins (25 points) must be implausible: the
     one-sided 95% lower bound lies above it. Many flips that happen to cancel out do not pass as
     calm; few tasks with few flips do. Otherwise `not_enough_evidence`.
   A loss that stays within the margin is allowed: that is what a margin is.
   A workload of a control that lost more than the margin by the exact test rejects too, whatever the
   others gained: an adapter that refuses everything refuses what it should as well.
3. Sight. A control on which the champion's own success rate is not above the margin can never lose
   that much: it is listed as blind and counts for nothing. At least one control must see.
4. Drift. Small losses, each within its margin, add up over nights. Given generation 0's evaluation of
   a control suite, a candidate that does worse on it than the champion may not have a net loss above the
   margin against that either. Given those of a held-out suite by the generations that served, no workload
   on which the candidate does worse than the champion may by the exact test have lost more than the margin
   since the best of them. Where it does no worse the fall is not its doing: memory may have changed, or an
   earlier night lost it, and rejecting would repair nothing; on a control it is told.
   Compared are the tasks of both evaluations: the whole suite while it is the same; of one that has changed
   since, those under the same key which ask the same and are judged alike, if at least `min_control_tasks`
   of them are left (of the workload, where that is what is judged). The best generation is the one since
   which the workload lost most of these tasks.
5. Length, in characters: on a control suite with a length factor the median answer may not grow or shrink
   by more than that; on a held-out suite with one it may not grow so much. A `contains` verifier is easily
   pleased by an adapter that rambles, names everything, or says one word. Held-out answers that grow
   fourfold without a factor of their own are told, and do not decide: there they may have had to.

Tasks that a verifier could not judge for one of the two count for neither, and are told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from evals.stats import Difference, paired_difference, sign_test
from memory.errors import ConfigError
from memory.night_records import Evaluation, TaskOutcome

Verdict = Literal["promote", "reject", "not_enough_evidence"]
Pair = tuple[Evaluation, Evaluation]
"""The champion's and the candidate's evaluation of one suite."""

_KIND = {"control": "Control", "held_out": "Held-out suite"}

GREW = 4.0
"""Held-out answers that grew by more are told, where their suite has no factor of its own."""


class GateConfig(BaseModel):
    """What counts as better, and how much may be lost elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Confidence of every bound."""
    min_tasks: int = Field(default=24, ge=1)
    """Fewer held-out tasks decide nothing."""
    min_control_tasks: int = Field(default=12, ge=1)
    """A smaller control suite cannot clear a candidate; it can still convict one."""
    control_margin: float = Field(default=0.10, ge=0.0, lt=1.0)
    """Largest net loss of success allowed on a control suite, and proven on one workload of any suite, in 0..1."""
    control_margins: dict[str, float] = Field(default={"refusals": 0.25})
    """Margins of single suites by name. Of twelve requests that a small model mostly misjudges, one that changes
    sides says nothing: this suite is there for the adapter that refuses everything, or nothing any more."""
    control_slack: float = Field(default=2.5, ge=1.0)
    """A loss of this many margins must be implausible."""
    length_factor: float | None = Field(default=None, gt=1.0)
    """How many times longer or shorter the median answer to any control may become; None: not judged. Leave it
    off where a suite's answers are actions, which learning to act shortens rightly."""
    length_factors: dict[str, float] = Field(default={"chat": 3.0})
    """Length factors of single suites by name, held-out ones too."""
    require_controls: bool = True
    """Without a control suite that can show a loss nothing is promoted."""

    def margin(self, suite: str) -> float:
        """The margin of a control suite, in 0..1."""
        return self.control_margins.get(suite, self.control_margin)

    def longest(self, suite: str, role: str) -> float | None:
        """The length factor of a suite; None: its answers may be as long as they like."""
        return self.length_factors.get(suite, self.length_factor if role == "control" else None)


class GateRow(BaseModel):
    """One line of the gate's table: a suite, or one workload of a held-out suite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str
    role: Literal["held_out", "control"]
    workload: str | None = None
    """None: the whole suite; for held-out tasks the whole of all suites."""
    n: int
    champion: int
    """Tasks with full marks."""
    candidate: int
    points: float
    low: float
    """One-sided lower bound of the difference at the gate's level, in points."""
    high: float
    p_value: float
    """Exact, one-sided: that the candidate is better."""
    margin: float | None = None
    """Allowed net loss in points, for control suites and for a held-out workload that lost more."""
    state: Literal["better", "same", "unproven", "worse", "held", "lost", "unclear", "blind", "part"]
    """Held-out: better, same, unproven, worse. Control: held, lost, unclear, blind. One workload: lost where that is
    proven, a held-out one unclear where it looks so, else `part` (it does not decide). Against generation 0: held,
    lost, or `part` where the candidate does no worse than the champion."""


class LengthRow(BaseModel):
    """Median length of the answers to one suite, in characters; no answer counts 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str
    champion: float
    candidate: float
    factor: float | None = None
    """How many times longer or shorter it may become; None: not judged."""
    drifted: bool


class GateDecision(BaseModel):
    """The verdict, one sentence with numbers for every reason, and the table behind them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Verdict
    reasons: list[str]
    table: list[GateRow]
    lengths: list[LengthRow] = Field(default_factory=list)


def decide(
    held_out: Sequence[Pair],
    controls: Sequence[Pair],
    config: GateConfig | None = None,
    earlier: Sequence[Evaluation] = (),
) -> GateDecision:
    """Judge a candidate by evaluations of the same suites under the same settings.

    `earlier` are stored evaluations by generations that served, oldest first: of generation 0 on control suites, of
    any on held-out ones. One under the same settings is compared with the candidate too, on the tasks that the two
    have in common; its memory may be an older one. Others are passed over.

    Raises: ConfigError when a pair differs in suite, content hash, role, task keys, settings or memory,
    or when a suite is given in the wrong role: such a comparison means nothing.
    """
    config = config or GateConfig()
    gain, gain_verdict, gain_reason = _judge_gain(held_out, config)
    parts = _workload_rows(held_out, "held_out", config)
    of_controls = [row for row in _workload_rows(controls, "control", config) if row.state == "lost"]
    lost = [row for row in (*parts, *of_controls) if row.state == "lost"]
    judged = [_judge_control(pair, config) for pair in controls]
    verdicts: list[Verdict] = [gain_verdict, *(verdict for _, verdict, _ in judged)]
    reasons = [
        gain_reason,
        *_unjudged([*held_out, *controls]),
        *(_workload_warning(row) for row in parts if row.high < 0 and row.state == "part"),
    ]
    reasons += [reason for _, _, reason in judged]
    if config.require_controls and all(row.state == "blind" for row, _, _ in judged):
        verdicts.append("not_enough_evidence")
        seen = "Every control suite is one the champion fails itself" if judged else "No control suite was run"
        reasons.append(f"{seen}, so forgetting could not have been seen.")
    unclear = [row for row in parts if row.state == "unclear"]
    if lost:
        verdicts.append("reject")
    if unclear:
        verdicts.append("not_enough_evidence")
    reasons += [
        f"{_told(row, f'{_KIND[row.role]} {row.suite!r}, workload {row.workload!r},', config)}: proven, and more than "
        f"the {row.margin:.0f} points it may lose."
        for row in lost
    ]
    reasons += [
        f"{_told(row, f'{_KIND[row.role]} {row.suite!r}, workload {row.workload!r},', config)}: may be chance, and is "
        f"too much to be let pass."
        for row in unclear
    ]
    drifts = [drift for pair in controls for drift in _judge_drift(pair, earlier, config)]
    drifts += [drift for pair in held_out for drift in _fallen(pair, earlier, config)]
    if any(row.state == "lost" for row, _ in drifts):
        verdicts.append("reject")
    reasons += [reason for _, reason in drifts]
    lengths = [_length(pair, config) for pair in [*held_out, *controls]]
    if any(row.drifted and row.factor is not None for row in lengths):
        verdicts.append("reject")
    reasons += [_length_told(row) for row in lengths if row.drifted]
    order: list[Verdict] = ["reject", "not_enough_evidence", "promote"]
    return GateDecision(
        verdict=min(verdicts, key=order.index),
        reasons=reasons,
        table=[gain, *parts, *(row for row, _, _ in judged), *of_controls, *(row for row, _ in drifts)],
        lengths=lengths,
    )


def pair_outcomes(a: Evaluation, b: Evaluation, *, same_settings: bool = True) -> list[tuple[TaskOutcome, TaskOutcome]]:
    """The outcomes of two evaluations of one suite, task by task, in the order of their keys. What could not be judged
    in one of them is left out.

    `same_settings=False` allows other settings and memory: for reports, never for a decision.
    Raises: ConfigError when the evaluations are not of the same tasks (or settings).
    """
    names = f"generation {a.generation} and {b.generation} on {a.suite!r}"
    checks: list[tuple[str, object, object]] = [
        ("suite", a.suite, b.suite),
        ("suite hash", a.suite_hash, b.suite_hash),
        ("role", a.role, b.role),
    ]
    if same_settings:
        checks += [("settings", a.settings, b.settings), ("memory", a.memory, b.memory)]
        if a.memory and b.memory:
            checks.append(("memory watermark", a.memory_watermark, b.memory_watermark))
    for what, of_a, of_b in checks:
        if of_a != of_b:
            raise ConfigError(f"cannot compare {names}: {what} differs ({of_a!r} and {of_b!r}); evaluate both again")
    unjudged = {*a.unjudged, *b.unjudged}
    by_key_a, by_key_b = ({k: o for k, o in _by_key(e).items() if k not in unjudged} for e in (a, b))
    if by_key_a.keys() != by_key_b.keys():
        odd = sorted(by_key_a.keys() ^ by_key_b.keys())
        raise ConfigError(f"cannot compare {names}: {len(odd)} task keys are in one only, e.g. {odd[0]!r}")
    return [(by_key_a[key], by_key_b[key]) for key in sorted(by_key_a)]


def _by_key(evaluation: Evaluation) -> dict[str, TaskOutcome]:
    found = {o.key: o for o in evaluation.outcomes}
    if len(found) != len(evaluation.outcomes):
        raise ConfigError(f"evaluation {evaluation.id} of {evaluation.suite!r} holds a task key twice")
    return found


def _pairs(evaluations: Iterable[Pair], role: str) -> list[tuple[str, TaskOutcome, TaskOutcome]]:
    found = []
    for champion, candidate in evaluations:
        if champion.role != role:
            raise ConfigError(f"suite {champion.suite!r} is {champion.role}, it was given as {role}")
        found += [(champion.suite, a, b) for a, b in pair_outcomes(champion, candidate)]
    return found


def _judge_gain(evaluations: Sequence[Pair], config: GateConfig) -> tuple[GateRow, Verdict, str]:
    pairs = _pairs(evaluations, "held_out")
    strata = [f"{suite}/{a.workload}" for suite, a, _ in pairs]
    row = _row("+".join(c.suite for c, _ in evaluations) or "held-out", "held_out", pairs, config, strata=strata)
    told = _told(row, "Held-out success", config)
    p_text = "p < 0.001" if row.p_value < 0.001 else f"p = {row.p_value:.3f}"
    if row.n < config.min_tasks:
        return (
            row.model_copy(update={"state": "unproven"}),
            "not_enough_evidence",
            f"Only {row.n} held-out tasks were run and {config.min_tasks} are needed: {told}.",
        )
    if row.points <= 0:
        state = "worse" if row.points < 0 else "same"
        return row.model_copy(update={"state": state}), "reject", f"{told}: the candidate is not better."
    if row.low > 0 and row.p_value < 1 - config.level:
        return row.model_copy(update={"state": "better"}), "promote", f"{told}, exact {p_text}: a proven gain."
    return (
        row.model_copy(update={"state": "unproven"}),
        "not_enough_evidence",
        f"{told}, exact {p_text}: a gain was seen and may be chance.",
    )


def _judge_control(pair: Pair, config: GateConfig) -> tuple[GateRow, Verdict, str]:
    suite = pair[0].suite
    margin = 100 * config.margin(suite)
    row = _row(suite, "control", _pairs([pair], "control"), config, margin=margin)
    told = _told(row, f"Control {suite!r}", config)
    floor = -config.control_slack * margin

    def judged(state: str, verdict: Verdict, why: str) -> tuple[GateRow, Verdict, str]:
        return row.model_copy(update={"state": state}), verdict, f"{told}: {why}."

    if row.points < -margin - 1e-9:
        sure = "proven" if row.high < 0 else "seen, not proven"
        return judged("lost", "reject", f"more than the {margin:.0f} points it may lose ({sure})")
    if row.n and 100 * row.champion / row.n <= margin:
        return judged("blind", "promote", "the champion fails it too, so it cannot show forgetting and does not count")
    if row.n < config.min_control_tasks:
        why = f"{row.n} tasks cannot clear a candidate, {config.min_control_tasks} are needed"
        return judged("unclear", "not_enough_evidence", why)
    if row.low < floor - 1e-9:
        why = f"a loss beyond {floor:.0f} points stays plausible, more control tasks are needed"
        return judged("unclear", "not_enough_evidence", why)
    return judged("held", "promote", f"within the {margin:.0f} points it may lose")


def _unjudged(evaluations: Sequence[Pair]) -> list[str]:
    left_out = [(champion.suite, sorted({*champion.unjudged, *other.unjudged})) for champion, other in evaluations]
    return [
        f"Warning: verifiers failed at {len(keys)} of the tasks of {suite!r}, which count on neither side: "
        f"{', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}."
        for suite, keys in left_out
        if keys
    ]


def _alike(earlier: Sequence[Evaluation], tonight: Evaluation) -> list[Evaluation]:
    wanted = (tonight.role, tonight.settings, tonight.memory)
    return [e for e in earlier if (e.role, e.settings, e.memory) == wanted]


def _comparable(
    earlier: Evaluation, tonight: Evaluation, config: GateConfig, workload: str | None = None
) -> list[tuple[TaskOutcome, TaskOutcome]]:
    """The tasks that both did, of one workload; none where too few of a suite that has changed are left."""
    found = [pair for pair in earlier.common(tonight) if workload in (None, pair[1].workload)]
    whole = earlier.suite_hash == tonight.suite_hash
    return found if whole or len(found) >= config.min_control_tasks else []


def _judge_drift(pair: Pair, earlier: Sequence[Evaluation], config: GateConfig) -> list[tuple[GateRow, str]]:
    """A control against the newest evaluation by generation 0 that can be compared, if there is one."""
    champion, candidate = pair
    # Against itself there is no drift to see: while generation 0 serves, the control says it all.
    known = [e for e in _alike(earlier, candidate) if e.generation == 0 != champion.generation]
    pairs = next((found for e in reversed(known) if (found := _comparable(e, candidate, config))), [])
    if not pairs:
        return []
    margin = 100 * config.margin(candidate.suite)
    suite = f"{candidate.suite} (against generation 0)"
    row = _row(suite, "control", [(suite, a, b) for a, b in pairs], config, margin=margin)
    told = _told(row, f"Since generation 0 control {candidate.suite!r}", config)
    if row.points >= -margin - 1e-9:
        return [(row.model_copy(update={"state": "held"}), f"{told}: within the {margin:.0f} points.")]
    told = f"{told}: more in all nights together than the {margin:.0f} points."
    if _net(pair_outcomes(champion, candidate)) < 0:
        return [(row.model_copy(update={"state": "lost"}), told)]
    return [(row, f"Warning: {told} The candidate does no worse there than the champion, which lost them before.")]


def _fallen(pair: Pair, earlier: Sequence[Evaluation], config: GateConfig) -> list[tuple[GateRow, str]]:
    """Held-out workloads that lose more tonight, and have lost beyond the margin since the best earlier generation."""
    champion, candidate = pair
    margin = 100 * config.margin(champion.suite)
    known = [e for e in _alike(earlier, candidate) if e.generation not in (champion.generation, candidate.generation)]
    tonight, found = pair_outcomes(champion, candidate), []
    for workload in sorted({b.workload for _, b in tonight}):
        if not known or _net([p for p in tonight if p[1].workload == workload]) >= 0:
            continue
        parts = [(e, _comparable(e, candidate, config, workload)) for e in known]
        best, part = min(parts, key=lambda known: _net(known[1]))
        named = [(best.suite, a, b) for a, b in part]
        if _proven_loss(named, margin, config):
            suite = f"{best.suite} (against generation {best.generation})"
            row = _row(suite, "held_out", named, config, workload=workload, margin=margin)
            told = _told(row, f"Since generation {best.generation} held-out workload {workload!r}", config)
            lost = row.model_copy(update={"state": "lost"})
            found.append((lost, f"{told}: more in all nights together than the {margin:.0f} points."))
    return found


def _net(pairs: Sequence[tuple[TaskOutcome, TaskOutcome]]) -> int:
    """Tasks that the second did and the first did not, less those the other way round."""
    return sum(b.success - a.success for a, b in pairs)


def _proven_loss(pairs: Sequence[tuple[str, TaskOutcome, TaskOutcome]], margin: float, config: GateConfig) -> bool:
    """Whether the exact test says that the second lost, and more than `margin` points."""
    wins = sum(b.success > a.success for _, a, b in pairs)
    losses = sum(a.success > b.success for _, a, b in pairs)
    proven = sign_test(losses, wins, one_sided=True) < 1 - config.level
    return proven and 100 * (losses - wins) > margin * len(pairs) + 1e-9


def _length(pair: Pair, config: GateConfig) -> LengthRow:
    suite, role = pair[0].suite, pair[0].role
    of = [median([len((o.answer or "").strip()) for o in e.outcomes]) if e.outcomes else 0.0 for e in pair]
    # Two answers of a word or two differ by any factor and by nothing that matters.
    before, after = (max(length, 10.0) for length in of)
    factor = config.longest(suite, role)
    if role == "held_out":
        drifted = after > (factor or GREW) * before
    else:
        drifted = factor is not None and max(before, after) > factor * min(before, after)
    return LengthRow(suite=suite, champion=of[0], candidate=of[1], factor=factor, drifted=drifted)


def _length_told(row: LengthRow) -> str:
    told = f"On {row.suite!r} the median answer went from {row.champion:.0f} to {row.candidate:.0f} characters"
    if row.factor is None:
        return f"Warning: {told}: see whether it says more, or only hedges."
    return f"{told}, more than {row.factor:g}-fold."


def _workload_rows(
    evaluations: Sequence[Pair], role: Literal["held_out", "control"], config: GateConfig
) -> list[GateRow]:
    """The workloads of every suite that has several or is held out; what fell too far is `lost` or `unclear`."""
    rows = []
    for pair in evaluations:
        suite, pairs = pair[0].suite, _pairs([pair], role)
        margin = 100 * config.margin(suite)
        fall = config.control_slack * margin + 1e-9
        workloads = sorted({a.workload for _, a, _ in pairs})
        for workload in workloads if role == "held_out" or len(workloads) > 1 else []:
            part = [p for p in pairs if p[1].workload == workload]
            row = _row(suite, role, part, config, workload=workload)
            if _proven_loss(part, margin, config):
                row = row.model_copy(update={"state": "lost", "margin": margin})
            elif role == "held_out" and len(part) >= config.min_control_tasks and row.points < -fall:
                row = row.model_copy(update={"state": "unclear", "margin": margin})
            rows.append(row)
    return rows


def _workload_warning(row: GateRow) -> str:
    return (
        f"Warning: on held-out workload {row.workload!r} success fell from {row.champion}/{row.n} "
        f"to {row.candidate}/{row.n}, {row.points:+.1f} points (upper bound {row.high:+.1f})."
    )


def _row(
    suite: str,
    role: Literal["held_out", "control"],
    pairs: list[tuple[str, TaskOutcome, TaskOutcome]],
    config: GateConfig,
    *,
    workload: str | None = None,
    strata: Sequence[str] | None = None,
    margin: float | None = None,
) -> GateRow:
    a = [champion.success for _, champion, _ in pairs]
    b = [candidate.success for _, _, candidate in pairs]
    workloads = strata if strata is not None else [champion.workload for _, champion, _ in pairs]
    found: Difference = paired_difference(a, b, config.level, one_sided=True, strata=workloads)
    return GateRow(
        suite=suite,
        role=role,
        workload=workload,
        n=found.n,
        champion=sum(a),
        candidate=sum(b),
        points=found.points,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        margin=margin,
        state="part",
    )


def _told(row: GateRow, what: str, config: GateConfig) -> str:
    if row.n == 0:
        return f"{what} was measured on no task"
    return (
        f"{what} went from {row.champion}/{row.n} ({row.champion / row.n:.0%}) to {row.candidate}/{row.n} "
        f"({row.candidate / row.n:.0%}), {row.points:+.1f} points "
        f"(one-sided {config.level:.0%} lower bound {row.low:+.1f})"
    )
