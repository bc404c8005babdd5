"""The watch: whether the generation that serves is worse than the one before, asked after every live outcome.

Owns the sequential test. Owns no stream of outcomes and no rollback (`serve`).

A fixed-sample test that is asked again after every reply cries wolf sooner or later. This one may be
asked as often as one likes, and stopped whenever one likes: under "not worse" the evidence passes
1 / (1 - level) at any time at all with a probability of at most 1 - level (Ville's inequality).

The evidence is the likelihood of all outcomes under a mixture of worse new rates, over the highest
likelihood that any pair of rates with new >= old can give them: universal inference with a
mixture for the numerator (Wasserman, Ramdas & Balakrishnan, PNAS 2020, arXiv 1912.11436); always-valid
p-values for experiments that are looked at all the time are Johari et al., arXiv 1512.04922. It asks for counts
only, so it does not matter in which order the two generations' outcomes came, one after the other or
side by side under a canary share.

What it takes for granted: each generation's outcomes are independent and its rate does not move. When
the kind of work changes with the generation, compare one workload at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field, model_validator

from memory.errors import ConfigError
from memory.records import Outcome, OutcomeSource

PROVEN_BY: frozenset[OutcomeSource] = frozenset({OutcomeSource.VERIFIER, OutcomeSource.USER})
"""Whose word decides what is served. A critic is a model and can be talked round; a teacher judges itself."""


class Tally(BaseModel):
    """Live outcomes of one generation: how many, and how many with full marks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(default=0, ge=0)
    successes: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _successes_are_among_them(self) -> Tally:
        if self.successes > self.n:
            raise ValueError(f"{self.successes} successes of {self.n} outcomes")
        return self

    @property
    def rate(self) -> float:
        """Share of successes; 0 of nothing."""
        return self.successes / self.n if self.n else 0.0


class WatchVerdict(BaseModel):
    """What the outcomes so far say of the new generation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worse: bool
    """Proven at the level asked for: time to roll back."""
    evidence: float
    """The e-value: 20 proves it at 95%; small numbers prove nothing, least of all that it is better."""
    p_value: float
    """Valid whenever one looks."""
    old: Tally
    new: Tally
    told: str


def tally(outcomes: Iterable[Outcome | None]) -> Tally:
    """Count what a verifier or a user judged; runs that nobody or only a model judged do not count."""
    counted = [outcome.success for outcome in outcomes if outcome is not None and outcome.by in PROVEN_BY]
    return Tally(n=len(counted), successes=sum(counted))


def watch(old: Tally, new: Tally, level: float = 0.95) -> WatchVerdict:
    """Judge the new generation by live outcomes; may be asked after every one of them.

    With 200 outcomes behind it, a fall of 30 points is mostly found within 60 new ones (tests/evals/test_watch.py).
    Raises: ConfigError when `level` is not in 0.5..1.
    """
    if not 0.5 <= level < 1:
        raise ConfigError(f"the watch's level lies in 0.5..1, got {level}")
    log_evidence = _log_evidence(old, new)
    worse = log_evidence >= -math.log(1 - level)
    evidence = math.exp(min(log_evidence, 700.0))
    p_value = min(1.0, math.exp(-log_evidence)) if log_evidence > 0 else 1.0
    found = f"proven at {level:.0%}" if worse else "not proven"
    told = (
        f"live success {old.successes}/{old.n} ({old.rate:.0%}) before, {new.successes}/{new.n} ({new.rate:.0%}) now: "
        f"that the new generation is worse is {found} (evidence {evidence:.3g}, p = {p_value:.2g})"
    )
    return WatchVerdict(worse=worse, evidence=evidence, p_value=p_value, old=old, new=new, told=told)


def _log_evidence(old: Tally, new: Tally) -> float:
    if old.n == 0 or new.n == 0:
        return 0.0
    if new.rate >= old.rate:
        best = _log_likelihood(old, old.rate) + _log_likelihood(new, new.rate)
    else:
        # The null's best pair of rates lies on its edge, where both are the same.
        pooled = (old.successes + new.successes) / (old.n + new.n)
        best = _log_likelihood(old, pooled) + _log_likelihood(new, pooled)
    # Both rates uniform, on condition that the new one is lower: half of the prior's weight.
    mixture = math.log(2) + _log_beta(old) + _log_beta(new) + math.log(_lower(old, new))
    return mixture - best


def _log_likelihood(seen: Tally, rate: float) -> float:
    failures = seen.n - seen.successes
    good = seen.successes * math.log(rate) if seen.successes else 0.0
    return good + (failures * math.log1p(-rate) if failures else 0.0)


def _log_beta(seen: Tally) -> float:
    """Log of the outcomes' probability under a uniform rate."""
    good, bad = seen.successes + 1, seen.n - seen.successes + 1
    return math.lgamma(good) + math.lgamma(bad) - math.lgamma(good + bad)


def _lower(old: Tally, new: Tally) -> float:
    """Posterior probability that the new rate is below the old one, both uniform before (a finite sum)."""
    a, b = new.successes + 1, new.n - new.successes + 1
    c, d = old.successes + 1, old.n - old.successes + 1

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    terms = (log_beta(a + i, b + d) - math.log(d + i) - log_beta(1 + i, d) - log_beta(a, b) for i in range(c))
    return min(1.0, max(math.fsum(map(math.exp, terms)), 1e-300))
