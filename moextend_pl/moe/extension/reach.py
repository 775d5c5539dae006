"""Which tokens may reach the new experts of one extension.

Shapes: B batch, S sequence, T tokens, N samples (B, but in packed rows).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.contracts import ExtensionPlan, UserError
from moextend_pl.samples.packing import tokens_beside


def reachable(
    routing: str, task: str, is_image_BS: Tensor, tasks: Sequence[str] | None, documents_BS: Tensor | None = None
) -> Tensor:
    """Returns which tokens may reach the new experts of an extension.

    Args:
        routing: Of the plan, see `contracts.ExtensionPlan`.
        task: The plan's task, or empty.
        is_image_BS: True on image placeholders, on those of sounds for `masked_sound`.
        tasks: Names of tasks, one a sample; None if the samples have none.
        documents_BS: Which sample each token belongs to, counted from 1; None where a row is one sample.

    Returns:
        A mask for `Reach.set`, (B,) or (B, S).
    """
    if routing == "open":
        return is_image_BS.new_ones(len(is_image_BS))
    mask = is_image_BS if routing == "masked_tokens" else tokens_beside(is_image_BS, documents_BS)
    if not task:
        return mask
    if not tasks:
        return torch.zeros_like(mask)
    # A copy that is not waited for.
    of_task_N = torch.tensor([name == task for name in tasks], device="cpu").to(mask.device, non_blocking=True)
    if documents_BS is not None:
        return mask & F.pad(of_task_N, (1, 0))[documents_BS]
    return mask & (of_task_N if mask.dim() == 1 else of_task_N.unsqueeze(1))


def is_reachable(routing: str, task: str, tasks: Sequence[str] | None, image_places: int) -> bool:
    """Tells whether any token of a batch may reach an extension, from what the host knows of it.

    Args:
        routing: As in `reachable`.
        task: As in `reachable`.
        tasks: As in `reachable`.
        image_places: Number of placeholders.

    Returns:
        False only if the mask of `reachable` is False everywhere.
    """
    return routing == "open" or (image_places > 0 and (not task or task in (tasks or ())))


def check_task(plans: Sequence[ExtensionPlan], task: str, has_image: bool) -> None:
    """Refuses a task under whose name a question would silently be answered by the base alone.

    Args:
        plans: Extension plans of the model.
        task: Name of the question's task, or empty.
        has_image: Whether a picture is asked about; without one no new expert is reached anyway.

    Raises:
        UserError: If the model was extended for no such task, or for tasks only and none is named.
    """
    known = sorted({plan.task for plan in plans if plan.routing != "open"} - {""})
    seeing = [plan for plan in plans if plan.routing != "masked_sound"]
    needed = has_image and bool(seeing) and all(plan.task and plan.routing != "open" for plan in seeing)
    if (known and task not in known) if task else needed:
        raise UserError(f"Expected `task` to be one of {known}, for which the model was extended, got {task!r}.")


class OneAtATime:
    """A lock of one model, whose reach is kept in it while it answers; a copy of the model has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[OneAtATime], tuple[()]]:
        return OneAtATime, ()


class Reach:
    """Which tokens of the current forward pass may reach the new experts of one extension.

    One object is shared by all layers of an extension. A mask by sequence holds for a prompt, for each
    cached decoding step after it, and for the beams of one prompt, which stand side by side. A mask by
    token holds for the tokens it names; those generated after them may not reach new experts.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._by_token: dict[int, Tensor] = {}
        self._places: Tensor | None = None

    def only(self, places_BN: Tensor | None) -> None:
        """Declares which tokens of a prompt the layers that come next still compute.

        Args:
            places_BN: Their places, for each row of a pass; None for all.
        """
        if places_BN is not self._places:
            self._places, self._by_token = places_BN, {}

    def set(self, mask: Tensor | None, somewhere: bool | None = None) -> None:
        """Declares the next forward passes.

        Args:
            mask: (B,) True for each sequence, or (B, S) for each token, that may reach new experts; None means
                no token.
            somewhere: Whether the mask may be True anywhere; if None its values are looked at, for which a GPU has to
                be waited for. True for a mask that is False everywhere costs time and changes no result.
        """
        if somewhere is None:
            somewhere = mask is not None and bool(mask.any())
        self._mask = mask if somewhere else None
        self._by_token = {}

    @property
    def nowhere(self) -> bool:
        """Whether no token may reach a new expert."""
        return self._mask is None

    def tokens(self, num_tokens: int) -> Tensor:
        """Returns the mask by token.

        Args:
            num_tokens: T of the pass, a multiple of the number of sequences.

        Returns:
            (T,) booleans.
        """
        if torch.compiler.is_compiling():  # a compiled layer sees no other one
            return self._expand(num_tokens)
        if num_tokens not in self._by_token:
            self._by_token[num_tokens] = self._expand(num_tokens)
        return self._by_token[num_tokens]

    def _expand(self, num_tokens: int) -> Tensor:
        assert self._mask is not None
        if self._places is not None and self._mask.dim() == 2:
            rows = self._mask.repeat_interleave(len(self._places) // len(self._mask), dim=0)
            return rows.gather(1, self._places).flatten()
        each, rest = divmod(num_tokens, self._mask.numel())
        if self._mask.dim() == 1:
            assert rest == 0, f"{num_tokens} tokens do not divide into the {len(self._mask)} sequences of the mask"
            return self._mask.repeat_interleave(each)
        if rest:  # a decoding step after the tokens of the mask
            return torch.zeros(num_tokens, dtype=torch.bool, device=self._mask.device)
        return self._mask.repeat_interleave(each, dim=0).flatten()
