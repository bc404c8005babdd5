"""Questions with what a good memory would recall for them: the labelled sets of `bench retrieval`.

Owns the sets and their labels. Owns no embedder and no measure (`evals.retrieval`). Questions that are stored and
questions that are asked come from different seeds; no question is in both.

- `runs`: of each of 32 reasoning-gym families, past questions; right is one of the same family.
- `principles`: the same questions asked, a sentence of advice for each family stored.
- `word_problems`: grade-school word problems from templates (reasoning-gym's gsm_symbolic, after Mirzadeh et al. 2024,
  arXiv 2410.05229): right is the same template with other names and numbers.
- `gsm8k`: real word problems (Cobbe et al. 2021) from files that the user has; right is a problem that is solved by the
  same operations in the same order. The words hardly tell, so this shows how far similarity of questions reaches.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.suites import FORM_FAMILIES, TRAINED_FAMILIES, UNTRAINED_FAMILIES, Families, reasoning_gym_tasks
from memory.errors import ConfigError, boundary
from memory.jsonl import lines_of

SEED = 80_001
FAMILIES: Families = {
    **TRAINED_FAMILIES,
    **UNTRAINED_FAMILIES,
    **FORM_FAMILIES,
    "aiw": {},
    "base_conversion": {},
    "caesar_cipher": {},
    "calendar_arithmetic": {},
    "coin_flip": {},
    "complex_arithmetic": {},
    "count_primes": {},
    "family_relationships": {},
    "knights_knaves": {},
    "number_filtering": {},
    "number_sequence": {},
    "number_sorting": {},
    "polynomial_equations": {},
    "simple_geometry": {},
    "syllogism": {},
}

PRINCIPLES: dict[str, str] = {
    "chain_sum": "Give the whole sum to the calculator as one expression instead of adding term by term.",
    "products": "Multiply large numbers with the calculator, never in the head.",
    "gcd": "To find the greatest common divisor of several numbers, nest gcd calls two at a time.",
    "lcm": "Find the least common multiple of a list by nesting lcm calls.",
    "letter_counting": "Count how often a letter occurs in a text with the count function, not by eye.",
    "simple_equations": "Hand the equation with its unknown variable to solve, exactly as it is written.",
    "basic_arithmetic": "Evaluate arithmetic with parentheses in one calculator call and keep the order of operations.",
    "leg_counting": "Multiply each animal's number by its legs, insects six and spiders eight, then add them up.",
    "spell_backward": "To spell a word backward, write its letters one by one from the last to the first.",
    "count_bits": "Write the number in binary and count the ones.",
    "power_function": "For a base raised to an exponent, multiply repeatedly and mind the sign of the exponent.",
    "fraction_simplification": "Divide numerator and denominator of a fraction by their greatest common divisor.",
    "bitwise_arithmetic": "Convert hexadecimal operands before shifting or adding and give the result in hexadecimal.",
    "prime_factorization": "Divide by the smallest primes first and list the prime factors with repetition.",
    "decimal_arithmetic": "Round only the last result to the decimal places that were asked for.",
    "word_sorting": "Sort words by ASCII order: all upper-case words come before lower-case ones.",
    "time_intervals": "Subtract start from end time in the smallest unit, then write the duration in the format asked.",
    "aiw": "When someone has brothers and sisters, do not forget that person when counting siblings.",
    "base_conversion": "Convert a number between bases by way of ten, with lower-case letters for digits above nine.",
    "caesar_cipher": "Try every shift of the alphabet until the encrypted text turns into words.",
    "calendar_arithmetic": "Reduce the days between two dates modulo seven to find the weekday.",
    "coin_flip": "Compare the number of heads with tails expected from flipping a fair coin.",
    "complex_arithmetic": "Treat real and imaginary parts separately and remember that i squared is minus one.",
    "count_primes": "To count the primes in a range, strike out multiples up to the square root.",
    "family_relationships": "Draw the family tree first: who is married to whom and whose child is who.",
    "knights_knaves": "Assume that one islander tells the truth and follow it until a statement contradicts.",
    "number_filtering": "Decide for each number whether to keep or remove it and leave the others as they are written.",
    "number_sequence": "Look at differences and ratios of neighbours to find the rule of a sequence.",
    "number_sorting": "Sort numbers by value, not by their digits as text, in the order asked for.",
    "polynomial_equations": "Bring a polynomial to zero and list all real roots in ascending order.",
    "simple_geometry": "The interior angles of a convex polygon add up to 180 times its sides minus two.",
    "syllogism": "Check whether the conclusion must follow from both premises, whatever is true in the world.",
}


@dataclass(frozen=True)
class Labelled:
    """What is stored, what is asked, and of what kind each is: right is what has the query's kind."""

    name: str
    stored: list[tuple[str, str]]
    """(kind, text), in no telling order."""
    asked: list[tuple[str, str]]

    @property
    def chance(self) -> float:
        """How often the first result is right when results are drawn at random."""
        kinds = Counter(kind for kind, _ in self.stored)
        return sum(kinds[kind] / len(self.stored) for kind, _ in self.asked) / len(self.asked)


def family_sets(stored: int = 8, asked: int = 8, families: Families = FAMILIES) -> list[Labelled]:
    """`runs` and `principles`, with `stored` and `asked` questions of every family."""
    kept = reasoning_gym_tasks(families, stored, SEED)
    known = frozenset(task.fingerprint for task in kept)
    questions = [(t.workload, t.question) for t in reasoning_gym_tasks(families, asked, SEED + 1, exclude=known)]
    runs = [(task.workload, task.question) for task in kept]
    principles = [(family, PRINCIPLES[family]) for family in families]
    return [_labelled("runs", runs, questions), _labelled("principles", principles, questions)]


def word_problems(stored: int = 255, asked: int = 255) -> Labelled:
    """Problems from some 85 templates; those asked are of templates that are stored."""
    kept, new = _from_templates(stored, SEED), _from_templates(4 * asked, SEED + 1)
    kinds, texts = {kind for kind, _ in kept}, {text for _, text in kept}
    return _labelled("word_problems", kept, [p for p in new if p[0] in kinds and p[1] not in texts][:asked])


def gsm8k(folder: Path, asked: int = 255, fewest: int = 5) -> Labelled | None:
    """Problems of `train.jsonl` stored and of `dev.jsonl` asked; None without the files.

    Only operations that at least `fewest` stored problems share are kinds. ConfigError for a broken file.
    """
    files = folder / "train.jsonl", folder / "dev.jsonl"
    if not all(file.is_file() for file in files):
        return None
    kept, new = (_by_operations(file) for file in files)
    kinds = {kind for kind, n in Counter(kind for kind, _ in kept).items() if kind and n >= fewest}
    return _labelled("gsm8k", kept, [(kind, text) for kind, text in new if kind in kinds][:asked])


def _from_templates(n: int, seed: int) -> list[tuple[str, str]]:
    import reasoning_gym

    with boundary(ConfigError, "reasoning-gym cannot make word problems"):
        made: Any = reasoning_gym.create_dataset("gsm_symbolic", size=n, seed=seed)
        return [(str(made.task_indices[i]), " ".join(made[i]["question"].split())) for i in range(n)]


def _by_operations(file: Path) -> list[tuple[str, str]]:
    with boundary(ConfigError, f"{file} is not GSM8K's JSONL"):
        rows = [json.loads(line) for line in lines_of(file.read_text(encoding="utf-8"))]
        return [(_operations(row["answer"]), row["question"]) for row in rows]


def _operations(answer: str) -> str:
    """`/+` for an answer that is worked out by a division and then a sum."""
    steps = re.findall(r"<<([^=>]*)=", answer)
    return "".join("".join(re.findall(r"(?<=[\d)%])[-+*/]", step.replace(" ", ""))) for step in steps)


def _labelled(name: str, stored: Sequence[tuple[str, str]], asked: Sequence[tuple[str, str]]) -> Labelled:
    mixed = list(stored)
    random.Random(SEED).shuffle(mixed)  # equal scores keep their order: it must not be that of the kinds
    return Labelled(name, mixed, list(asked))
