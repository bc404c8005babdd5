"""The plain-chat control: what an instruct model could do before it learned to act.

Owns two dozen hand-written questions and how they are judged (verifier `contains`: one of `any` in the
answer, nothing of `none`, at least `min_words` words). They have no tools, so the agent's grammar does
not hold the model in form: an adapter that turned every reply into an action shows here.
"""

from __future__ import annotations

from evals.suites import EvalTask, Suite, frozen_task
from memory.records import Task, VerifierSpec

ACTION_MARKS = ["Action:", "Observation:", "finish(", "calc("]
"""Traces of the agent's protocol that have no place in chat."""

SHORT = 24
"""Length of the suite that fits a quick demo; the first questions are a mix of all kinds."""

# (question, one of these must be said, at least so many words). Not picked by what the base model
# knows: SmolLM2-135M-Instruct (greedy, 72 tokens) passes 20 of the first 24 and 32 of all 40. A suite
# of passes only could only fall, and would call every change forgetting.
_QUESTIONS: list[tuple[str, list[str], int]] = [
    ("What is the capital of France?", ["paris"], 1),
    ("What is the capital of Italy?", ["rome"], 1),
    ("What is the capital of Germany?", ["berlin"], 1),
    ("What is the opposite of hot?", ["cold"], 1),
    ("What color is the sky on a clear day?", ["blue"], 1),
    ("What color is grass?", ["green"], 1),
    ("What does 'Bonjour' mean in English?", ["hello", "good morning", "good day"], 1),
    ("What does the Spanish word 'gracias' mean in English?", ["thank"], 1),
    ("Name three fruits.", ["apple", "banana", "orange", "grape", "mango", "strawberr"], 2),
    ("Write a short story about a cat.", ["cat", "kitten"], 20),
    ("Hello! How are you today?", ["hello", "help", "fine", "well", "assist", "good"], 3),
    ("Thank you for your help!", ["welcome", "glad", "happy", "help"], 2),
    ("Who wrote the play Romeo and Juliet?", ["shakespeare"], 1),
    ("How many days are there in a week?", ["seven", "7"], 1),
    ("What is the largest ocean on Earth?", ["pacific"], 1),
    ("What gas do humans need to breathe?", ["oxygen"], 1),
    ("Rewrite this sentence more politely: Give me the book.", ["please", "could", "would", "may i"], 4),
    ("Rewrite this sentence in the past tense: I walk to school.", ["walked"], 3),
    ("Explain in one sentence what a library is.", ["book", "information", "resource"], 6),
    ("Give me one tip for sleeping better.", ["sleep", "bed", "routine", "relax"], 6),
    ("Write a short birthday wish for my sister.", ["birthday"], 5),
    ("What do you call a baby dog?", ["puppy", "pup"], 1),
    ("Suggest a healthy breakfast.", ["oat", "egg", "fruit", "yogurt", "toast", "smoothie", "avocado"], 4),
    ("Describe the sun in one sentence.", ["star", "light", "heat", "bright"], 6),
    ("What is the capital of Japan?", ["tokyo"], 1),
    ("List three animals that live in the sea.", ["whale", "shark", "dolphin", "fish", "turtle", "octopus", "seal"], 3),
    ("Write two sentences about a rainy day.", ["rain"], 10),
    ("Which planet do we live on?", ["earth"], 1),
    ("What do bees make?", ["honey"], 1),
    ("What is water made of?", ["hydrogen", "oxygen", "h2o"], 2),
    ("What language do people speak in Brazil?", ["portuguese"], 1),
    ("What is the name of the season after winter?", ["spring"], 1),
    ("Why do we brush our teeth?", ["teeth", "tooth", "plaque", "bacteria", "oral"], 8),
    ("Who was the first president of the United States?", ["washington"], 1),
    ("Which animal says 'meow'?", ["cat"], 1),
    ("Write a polite email asking for a day off.", ["dear", "subject", "request", "day off"], 15),
    ("What is snow?", ["frozen", "water", "precipitation", "ice crystal"], 6),
    ("Tell me a fact about elephants.", ["elephant"], 6),
    ("What is the boiling point of water in Celsius?", ["100"], 1),
    ("What is photosynthesis?", ["plant", "light", "energy"], 8),
]


def chat_suite(size: int = SHORT) -> Suite:
    """The first `size` questions as a control suite; all of them when there are fewer."""
    tasks = []
    for number, (question, said, words) in enumerate(_QUESTIONS[:size]):
        args = {"any": said, "none": ACTION_MARKS, "min_words": words}
        task = Task(
            workload="chat",
            messages=[{"role": "user", "content": question}],
            tools=[],
            verifier=VerifierSpec(name="contains", args=args),
            source="chat",
        )
        tasks.append(EvalTask(key=f"chat/{number}", task=frozen_task(task)))
    return Suite(name="chat", role="control", tasks=tasks)
