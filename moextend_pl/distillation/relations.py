"""Terms that compare relations inside one sample: of image tokens among themselves, and with the answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moextend_pl.distillation import terms
from moextend_pl.distillation.losses import DistillTerm, Scopes, check_choice, heard
from moextend_pl.distillation.scopes import Scope
from moextend_pl.distillation.signals import Signals
from moextend_pl.training.losses import global_mean

BLOCKS = ("image_answer", "answer_image", "image_image", "answer_answer")


class RelationTerm(DistillTerm):
    """How the image tokens of a sample relate in the space of words (LLaVA-KD's RDist); the mean over such samples.

    Args:
        weight: The trainer's source has 1, the paper is reported to have 0.5.
    """

    name = "relation"
    needs_logits = True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight, "image", "samples")

    def compare(self, student: Signals, teacher: Signals, scopes: Scopes, adapter: nn.Module | None) -> Tensor:
        """Compares logits at all image tokens of each sample."""
        image = scopes["image"]
        pairs = (image.by_sample(heard(each.logits).index_select(0, image.rows)) for each in (student, teacher))
        return mean_of([terms.relation(*pair).reshape(1) for pair in zip(*pairs, strict=True) if len(pair[0])], student)


class AffinityTerm(DistillTerm):
    """How image tokens and answer tokens of a sample relate in the last hidden states (LLAVADI; it did harm there).

    Args:
        weight: As above.
    """

    name = "affinity"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight, "answer_own")

    @property
    def scopes(self) -> set[str]:
        """Image tokens and answer tokens."""
        return {"image", "answer_own"}

    def compare(self, student: Signals, teacher: Signals, scopes: Scopes, adapter: nn.Module | None) -> Tensor:
        """Compares cosines of each image token with each answer token of its sample; all pairs weigh alike."""
        states = (heard(each.hidden) for each in (student, teacher))
        pairs = (
            zip(*(part.by_sample(all_TD.index_select(0, part.places)) for part in parts(scopes)), strict=True)
            for all_TD in states
        )
        return mean_of([terms.affinity(*pair).flatten() for pair in zip(*pairs, strict=True)], student)


class AttentionTerm(DistillTerm):
    """Attention weights of the last layer, as blocks of image and answer tokens of a sample (LLAVADI).

    Args:
        weight: Of the mean of the blocks; the release has 5.
        blocks: Who looks at whom, each `image` or `answer`, `_` and again.
    """

    name = "attention"
    needs_attention = True

    def __init__(self, weight: float = 5.0, blocks: Sequence[str] = BLOCKS) -> None:
        super().__init__(weight, "answer_own", "samples")
        for block in blocks:
            check_choice(self, "blocks", block, BLOCKS)
        self.blocks = list(blocks)

    @property
    def scopes(self) -> set[str]:
        """Image tokens and answer tokens."""
        return {"image", "answer_own"}

    def compare(self, student: Signals, teacher: Signals, scopes: Scopes, adapter: nn.Module | None) -> Tensor:
        """Compares what tokens of a sample pay to other tokens of it; the mean over blocks of means over tokens."""
        tokens = dict(zip(("image", "answer"), parts(scopes), strict=True))
        pairs = [block.split("_") for block in self.blocks]
        return torch.stack([self._block(student, teacher, tokens[q], tokens[k]) for q, k in pairs]).mean()

    def _block(self, student: Signals, teacher: Signals, looking: Scope, looked_at: Scope) -> Tensor:
        keys = looked_at.by_sample(looked_at.places % student.length)
        maps = (
            [
                rows.index_select(2, own)
                for rows, own in zip(looking.by_sample(weights.index_select(0, looking.places)), keys, strict=True)
            ]
            for weights in (heard(student.attention), heard(teacher.attention))
        )
        return mean_of([terms.attention(*pair) for pair in zip(*maps, strict=True) if pair[0].numel()], student)


def parts(scopes: Scopes) -> tuple[Scope, Scope]:
    """Returns image tokens and answer tokens."""
    return scopes["image"], scopes["answer_own"]


def mean_of(found: list[Tensor], student: Signals) -> Tensor:
    """Returns the mean over the global batch of what was found for each sample; 0 where nothing was.

    Args:
        found: One vector a sample, of any length.
        student: Heard here, on the device of the result.
    """
    values = torch.cat([heard(student.hidden).new_empty(0, dtype=torch.float32), *found])
    return global_mean(values.sum(), values.new_full((), len(values)))
