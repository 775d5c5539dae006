"""Which experts the tokens of one answer chose, layer by layer.

Shapes: S tokens of the prompt, T tokens in all, K selected per token, E experts of the layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moextend_pl.moe.blocks import expert_count, list_blocks
from moextend_pl.moe.extension.extended_experts import ExtendedExperts
from moextend_pl.moe.usage import TOKEN_KINDS, RouterRecord, selection_counts


@dataclass(frozen=True)
class ExpertMap:
    """Selections of one answer.

    Attributes:
        tokens: How many tokens were read, by kind: those of pictures, and those of texts, the answer's own included.
        counts: Selections of each expert, new ones last, by kind and layer.
        old: Number of the base's experts, by layer.
    """

    tokens: Mapping[str, int]
    counts: Mapping[str, Mapping[int, tuple[int, ...]]]
    old: Mapping[int, int]

    def shares(self, kind: str, layer: int) -> list[float]:
        """Returns the share of each expert in all selections of a layer; zeros where there is none."""
        counts = self.counts[kind][layer]
        return [count / max(sum(counts), 1) for count in counts]

    def new_share(self, kind: str, layer: int) -> float:
        """Returns the share of a layer's selections that fell on new experts."""
        return sum(self.shares(kind, layer)[self.old[layer] :])


def base_experts(model: nn.Module) -> dict[int, int]:
    """Returns how many of each layer's experts are the base's own.

    Args:
        model: A transformers model, grown or not.
    """
    experts = {block.layer: block.experts for block in list_blocks(model)}
    return {
        layer: expert_count(each.root if isinstance(each, ExtendedExperts) else each) for layer, each in experts.items()
    }


def expert_map(records: Sequence[RouterRecord], is_image_S: Tensor, old: Mapping[int, int]) -> ExpertMap:
    """Counts what the routers did for one answer.

    Args:
        records: Of every pass, the prompt's first; the passes after it read what was generated, which is text.
        is_image_S: True on image placeholders of the prompt.
        old: As `base_experts` returns it.
    """
    indices, experts = defaultdict(list), {}
    for record in records:
        indices[record.layer].append(record.indices.cpu())
        experts[record.layer] = record.num_experts
    passes_TK = {layer: torch.cat(parts) for layer, parts in sorted(indices.items())}
    images = is_image_S.cpu()
    tokens = max((len(chosen_TK) for chosen_TK in passes_TK.values()), default=len(images))
    is_image_T = torch.cat([images, torch.zeros(tokens - len(images), dtype=torch.bool)])
    masks = dict(zip(TOKEN_KINDS, (is_image_T, ~is_image_T), strict=True))
    counts = {
        kind: {
            layer: tuple(selection_counts(chosen_TK, experts[layer], mask_T).tolist())
            for layer, chosen_TK in passes_TK.items()
        }
        for kind, mask_T in masks.items()
    }
    return ExpertMap({kind: int(mask_T.sum()) for kind, mask_T in masks.items()}, counts, dict(old))
