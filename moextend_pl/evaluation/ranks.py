"""Several processes that answer the questions of a set together, each whole batches of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moextend_pl.contracts import UserError

if TYPE_CHECKING:
    from moextend_pl.evaluation.question import Question

Answers = Callable[[Sequence["Question"]], list[str]]
_NAMES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
WAIT = timedelta(minutes=30)
"""For the slowest process to answer a batch."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one evaluation, as `torchrun` started them.

    Attributes:
        rank: Number of this process.
        size: Of all.
        local: Number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    def from_first(self, value: Any) -> Any:
        """Returns what the first process has."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def together(self, answers: Answers, batch_size: int) -> Answers:
        """Returns a function that shares as many batches as there are processes, and has all their answers.

        Batches are those of one process, so that answers are too.

        Args:
            answers: Asks the model of this process.
            batch_size: Questions that one process answers at a time.
        """
        if self.size == 1:
            return answers

        def shared(questions: Sequence[Question]) -> list[str]:
            import torch.distributed as dist

            own = questions[self.rank * batch_size : (self.rank + 1) * batch_size]
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, answers(own) if own else [])
            return [text for each in found for text in each]

        return shared


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the processes that `torchrun` started; a process that was started alone is one of one.

    Raises:
        UserError: If something else started several.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        raise UserError(
            "Expected one process, or several that `torchrun` starts, got several of `srun`, which would write over "
            "each other's answers. Use `srun torchrun --nproc-per-node GPUS -m moextend_pl evaluate`, a task a node."
        )
    ranks = Ranks(*(int(os.environ.get(name) or least) for name, least in _NAMES.items()))
    if ranks.size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=WAIT)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
