"""Layout: a recipe's example in the prompt as it is served, with the recalled block or without.

Owns what stands in front of an example's run. Owns neither what is recalled (`memory.recall`) nor how a
prompt is put together (`agent.prompts.compose`, handed in).
"""

from __future__ import annotations

from collections.abc import Callable

from distill.runs import MISTAKE, task_messages
from memory.recall import Recall, Recaller
from memory.records import DEFAULT_TENANT, RECALLED, Example, Message, Task, content_hash

Compose = Callable[[Task, list[str], Recall | None], list[Message]]
"""`agent.prompts.compose`: everything that stands before the run's first assistant turn."""


class Layout:
    """Puts the prompt in front of examples; asks memory once for each task."""

    def __init__(self, recaller: Recaller, compose: Compose) -> None:
        self._recaller = recaller
        self._compose = compose
        self._recalls: dict[str, Recall] = {}

    def served(self, example: Example, task: Task) -> Example:
        """As it would be served now, had this task never been seen."""
        if task.id not in self._recalls:
            self._recalls[task.id] = self._recaller.recall(
                task,
                exclude_task_ids=frozenset({task.id}),
                exclude_fingerprints=frozenset({task.fingerprint}),
            )
        recall = self._recalls[task.id]
        return self._lay_out(example, task, recall if recall.items else None)

    def bare(self, example: Example, task: Task) -> Example:
        """As it would be served with an empty memory."""
        return self._lay_out(example, task, None)

    def _lay_out(self, example: Example, task: Task, recall: Recall | None) -> Example:
        # An assistant turn that came with the task is context, perhaps not ours: it gets the one mark
        # that keeps the loss off.
        prefix = [
            {**m, "name": RECALLED} if m.get("role") == "assistant" else m
            for m in self._compose(task, example.tools, recall)
        ]
        run = [
            {**m, "name": RECALLED} if m.get("name") == MISTAKE else m
            for m in example.messages[len(task_messages(task)) :]
        ]
        laid_out = example.model_copy(update={"messages": prefix + run, "with_memory": recall is not None})
        # Two tenants that were asked the same keep an example each: forgetting one must not hide the other's.
        mine = laid_out.content_hash
        mine = mine if example.tenant == DEFAULT_TENANT else content_hash([example.tenant, mine])
        return laid_out.model_copy(update={"id": f"ex_{mine[:32]}"})
