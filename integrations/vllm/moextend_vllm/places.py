"""How a token tells which new experts it may reach: by its position.

vLLM computes the tokens of many requests in one flat pass, and says of each token only its position. Which new experts
a token may reach depends on its whole request, so it is written into the position when a request arrives: bit 24 and
above hold one flag for each extension. Before the model sees positions, the flags are taken off again. vLLM adds the
distance between the two to the positions of generated tokens as it does for M-RoPE, so that they carry the flags of
their prompt.

Shapes: S tokens of a prompt, T tokens of a pass, 3 rows of M-RoPE (all alike here).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moextend_pl.contracts import ExtensionPlan
from moextend_pl.moe.extension.reach import reachable

FLAG = 1 << 24
"""First flag; longest contexts are shorter."""

MOST_EXTENSIONS = 6
"""vLLM keeps positions in 32 bits in some places, and a sign is one of them."""


def marked_places(plans: Sequence[ExtensionPlan], task: str, is_image_S: Tensor) -> tuple[Tensor, int]:
    """Returns positions of a prompt with their flags, and what is to be added to those of its answer.

    Args:
        plans: Of the model, the first extension first.
        task: Name of the task of all questions, or empty.
        is_image_S: True on image placeholders.

    Returns:
        (3, S) positions, and the flags of generated tokens.
    """
    flags_S = torch.zeros(len(is_image_S), dtype=torch.long)
    after = 0
    for number, plan in enumerate(plans):
        mask = reachable(plan.routing, plan.task, is_image_S[None], [task])
        flags_S += mask.reshape(-1).long() * (FLAG << number)  # of the sequence, or of each token
        if mask.dim() == 1:
            after += int(mask.item()) * (FLAG << number)
    return (torch.arange(len(is_image_S)) + flags_S).expand(3, -1).clone(), after


def read_places(places_T: Tensor, extensions: int) -> tuple[Tensor, list[Tensor]]:
    """Takes the flags off positions.

    Args:
        places_T: Positions with flags.
        extensions: How many there are.

    Returns:
        (T,) plain positions, and for each extension (T,) booleans.
    """
    flags_T = places_T // FLAG
    return places_T % FLAG, [(flags_T >> number) % 2 == 1 for number in range(extensions)]
