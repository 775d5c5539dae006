"""Which published tensors one of ours is made of, and how; read in both directions.

Shapes: E experts, I hidden width (2 I where two maps are stacked), D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moextend_pl.contracts import UserError

SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the published ones it is made of.

    Attributes:
        ours: Its name here.
        published: Names there. One row for each member that is stacked along a new first dimension; the
            names of a row are concatenated along the first dimension.
        stacked: Whether there is such a dimension; else there is one row.
    """

    ours: str
    published: tuple[tuple[str, ...], ...]
    stacked: bool = False

    @property
    def names(self) -> list[str]:
        """The published names, row by row."""
        return [name for row in self.published for name in row]

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Makes our tensor from the published ones."""
        rows = [
            torch.cat([tensors[name] for name in row]) if len(row) > 1 else tensors[row[0]] for row in self.published
        ]
        return torch.stack(rows) if self.stacked else rows[0]

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Makes the published tensors from ours."""
        rows = tensor.unbind() if self.stacked else (tensor,)
        return {
            name: value.clone()
            for names, row in zip(self.published, rows, strict=True)
            for name, value in zip(names, row.chunk(len(names)), strict=True)
        }

    def line(self) -> dict[str, str | list[str]]:
        """Returns the entry as the report shows it."""
        how = "stacked" if self.stacked else "concatenated" if len(self.published[0]) > 1 else "as it is"
        return {"ours": self.ours, "published": self.names, "how": how}


def same(ours: str, published: str) -> Entry:
    """Returns the entry of a tensor that is taken as it is."""
    return Entry(ours, ((published,),))


def check_names(expected: Iterable[str], got: Iterable[str], origin: str) -> None:
    """Refuses a set of tensors that is not exactly the layout's.

    Raises:
        UserError: If one is missing or unexpected; shows the first few.
    """
    wanted, there = set(expected), set(got)
    missing, unexpected = sorted(wanted - there), sorted(there - wanted)
    if missing or unexpected:
        raise UserError(
            f"{origin}: expected the {len(wanted)} tensors of the layout, got {len(there)}: {len(missing)} missing "
            f"{missing[:SHOWN]}, {len(unexpected)} unexpected {unexpected[:SHOWN]}. Nothing was written."
        )


def clip_entries(layers: int, experts: int, published: str, ours: str = "") -> list[Entry]:
    """Entries of a CLIP vision tower (CuMo's layout, which is that of transformers but for the experts).

    Args:
        layers: Number of blocks.
        experts: E of every block; 0 for a dense tower.
        published: What the published names begin with, for example `vision_model.`.
        ours: What our names begin with.
    """
    names = ["class_embedding", "patch_embedding.weight", "position_embedding.weight"]
    outside = [f"embeddings.{name}" for name in names] + ["pre_layrnorm.weight", "pre_layrnorm.bias"]
    entries = [same(ours + name, published + name) for name in outside]
    for layer in range(layers):
        block = f"encoder.layers.{layer}."
        entries += clip_block_entries(experts, published + block, ours + block)
    return entries


def clip_block_entries(experts: int, published: str, ours: str = "") -> list[Entry]:
    """Entries of one block of a CLIP tower; arguments as for `clip_entries`."""
    modules = [f"self_attn.{name}_proj" for name in "qkv"] + ["self_attn.out_proj", "layer_norm1", "layer_norm2"]
    modules += [] if experts else ["mlp.fc1", "mlp.fc2"]
    entries = [same(f"{ours}{m}.{kind}", f"{published}{m}.{kind}") for m in modules for kind in ("weight", "bias")]
    return entries + expert_entries(experts, ("fc1", "fc2"), published, f"{ours}mlp.")


def expert_entries(experts: int, maps: tuple[str, str], published: str, ours: str) -> list[Entry]:
    """Entries of the router and the experts of one upcycled MLP with biases; none where `experts` is 0."""
    if not experts:
        return []
    entries = [same(f"{ours}gate.weight", f"{published}gate.weight")]
    for target, name in zip(("up_proj", "down_proj"), maps, strict=True):
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            members = tuple((f"{published}experts.{e}.{name}.{kind}",) for e in range(experts))
            entries.append(Entry(f"{ours}experts.{target}{suffix}", members, stacked=True))
    return entries


def projector_entries(experts: int, published: str, ours: str = "") -> list[Entry]:
    """Entries of a two-layer projector: dense, or a mixture of E experts.

    Args:
        experts: E, or 0.
        published: For example `model.mm_projector.`.
        ours: For example `projector.`.
    """
    if experts:
        return expert_entries(experts, ("0", "2"), published, f"{ours}layers.")
    return [same(f"{ours}layers.{n}.{kind}", f"{published}{n}.{kind}") for n in (0, 2) for kind in ("weight", "bias")]
