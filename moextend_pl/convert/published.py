"""What a published checkpoint of CuMo or MoExtend holds, told by its tensors.

Layouts: `clip.bin` and `mm_projector.bin` of CuMo, whole models of CuMo (`model.vision_tower.*`,
`model.mm_projector.*`) and of MoExtend (`model.visual.*`, with `gate_vision`, `weight_scale` and more
experts in extended layers). The language model has the names of stock Mistral or Mixtral.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moextend_pl.contracts import UserError
from moextend_pl.convert.entries import Entry, clip_entries, projector_entries, same

LAYOUTS = ("cumo", "moextend")
TOWER_MARK = "embeddings.class_embedding"
TOWER_PREFIX = {"cumo": "model.vision_tower.vision_model.", "moextend": "model.visual.vision_tower.vision_model."}
PROJECTOR_PREFIX = {"cumo": "model.mm_projector.", "moextend": "model.visual.mm_projector."}
OURS_TOWER, OURS_PROJECTOR, OURS_LANGUAGE = "encoder.tower.", "projector.", "language.model."
BLOCK = "block_sparse_moe."


@dataclass(frozen=True)
class Parts:
    """Entries of a checkpoint by part, with our names as in a delta.

    Attributes:
        encoder: The vision tower; empty where the checkpoint has none.
        projector: The projector; likewise.
        language: The language model without new experts; likewise.
        extension: Router rows, calibration and experts that MoExtend added.
        extended: By extended layer, the number of new experts.
        encoder_experts: E of the tower's blocks; 0 where they are dense.
        projector_experts: E of the projector; likewise.
    """

    encoder: list[Entry]
    projector: list[Entry]
    language: list[Entry]
    extension: list[Entry]
    extended: dict[int, int]
    encoder_experts: int = 0
    projector_experts: int = 0

    @property
    def entries(self) -> list[Entry]:
        """All entries."""
        return [*self.encoder, *self.projector, *self.language, *self.extension]


def _numbers(names: Iterable[str], pattern: str) -> int:
    found = [int(match[1]) for name in names if (match := re.search(pattern, name))]
    return max(found, default=-1) + 1


def tower_part(names: Iterable[str], layout: str) -> tuple[list[Entry], int]:
    """Reads which tower the names belong to.

    Returns:
        Its entries and its number of experts, both empty where there is no tower.
    """
    names = list(names)
    marks = [name for name in names if name.endswith(TOWER_MARK)]
    if not marks:
        return [], 0
    prefix = marks[0].removesuffix(TOWER_MARK)
    own = [name for name in names if name.startswith(prefix)]
    experts = _numbers(own, r"encoder\.layers\.\d+\.experts\.(\d+)\.") if layout == "cumo" else 0
    entries = clip_entries(_numbers(own, r"encoder\.layers\.(\d+)\."), experts, prefix, OURS_TOWER)
    # transformers' own tower has a last norm, which features never pass; CuMo leaves it out.
    last = [f"post_layernorm.{kind}" for kind in ("weight", "bias")]
    return entries + [same(OURS_TOWER + name, prefix + name) for name in last if prefix + name in own], experts


def projector_part(names: Iterable[str], layout: str) -> tuple[list[Entry], int]:
    """Reads which projector the names belong to; as `tower_part`."""
    own = [name for name in names if name.startswith(PROJECTOR_PREFIX[layout])]
    experts = _numbers(own, r"\.experts\.(\d+)\.")
    return (projector_entries(experts, PROJECTOR_PREFIX[layout], OURS_PROJECTOR) if own else []), experts


def holds_language(names: Iterable[str]) -> bool:
    """Tells whether names of a language model are among those of a checkpoint."""
    return any(name.startswith(("model.embed_tokens.", "model.layers.", "lm_head.")) for name in names)


def language_entries(config: PreTrainedConfig, extended: Collection[int]) -> list[Entry]:
    """Entries of a Mistral or Mixtral as transformers v5 holds it in memory.

    Args:
        config: Its configuration.
        extended: Layers whose router and experts are wrapped by an extension.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = int(getattr(config, "num_local_experts", 0))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    entries = [_language_entry(name, experts) for name in model.state_dict() if name not in tied]
    return [replace(entry, ours=_wrapped(entry.ours, extended)) for entry in entries]


def _wrapped(name: str, extended: Collection[int]) -> str:
    match = re.fullmatch(r"(.*\.layers\.(\d+)\.mlp\.(?:gate|experts))\.(.*)", name)
    return f"{match[1]}.base.{match[3]}" if match and int(match[2]) in extended else name


def _language_entry(name: str, experts: int) -> Entry:
    layer, found, rest = name.partition("mlp.")
    ours, published = OURS_LANGUAGE + name, layer + BLOCK
    if not experts or not found:
        return same(ours, name)
    if rest == "gate.weight":
        return same(ours, published + rest)
    maps = ("w1", "w3") if rest == "experts.gate_up_proj" else ("w2",)
    rows = tuple(tuple(f"{published}experts.{e}.{m}.weight" for m in maps) for e in range(experts))
    return Entry(ours, rows, stacked=True)


def extension_entries(layer: int, experts: int, new: int) -> list[Entry]:
    """Entries of the new experts of one layer, their router rows and calibration.

    Args:
        layer: 0-based decoder layer.
        experts: E of the base.
        new: N, experts behind those of the base.
    """
    ours, theirs = f"{OURS_LANGUAGE}model.layers.{layer}.mlp.", f"model.layers.{layer}.{BLOCK}"
    entries = [
        same(f"{ours}gate.weight", f"{theirs}gate_vision.weight"),
        same(f"{ours}gate.calibration.in_proj", f"{theirs}weight_scale.weight_scale.0.weight"),
        same(f"{ours}gate.calibration.out_proj", f"{theirs}weight_scale.weight_scale.2.weight"),
    ]
    for target, maps in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
        rows = tuple(tuple(f"{theirs}experts.{e}.{m}.weight" for m in maps) for e in range(experts, experts + new))
        entries.append(Entry(f"{ours}experts.new.{target}", rows, stacked=True))
    return entries


def read_parts(tensors: Mapping[str, Tensor], config: PreTrainedConfig | None, layout: str) -> Parts:
    """Reads what a checkpoint holds.

    Args:
        tensors: Of the checkpoint.
        config: Configuration of its language model; None where it has none.
        layout: `cumo` or `moextend`.

    Raises:
        UserError: If there is a language model and no configuration, or nothing is recognised.
    """
    encoder, encoder_experts = tower_part(tensors, layout)
    projector, projector_experts = projector_part(tensors, layout)
    language: list[Entry] = []
    extended: dict[int, int] = {}
    if config is not None:
        base = int(getattr(config, "num_local_experts", 0))
        marks = [re.fullmatch(rf"model\.layers\.(\d+)\.{BLOCK}gate_vision\.weight", name) for name in tensors]
        for match in marks if layout == "moextend" else []:
            if match:
                extended[int(match[1])] = len(tensors[match[0]])
        language = language_entries(config, extended)
        extension = [e for layer, new in sorted(extended.items()) for e in extension_entries(layer, base, new)]
    else:
        extension = []
        if holds_language(tensors):
            raise UserError(
                "Expected a config.json beside a checkpoint with a language model, found none. Download it too."
            )
    if not (encoder or projector or language):
        raise UserError(f"Expected a checkpoint of the layout {layout}, recognised neither tower, projector nor model.")
    return Parts(encoder, projector, language, extension, extended, encoder_experts, projector_experts)
