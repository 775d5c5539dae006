"""Shapes of published tensors, against the same model built on the meta device, before anything is read or written."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig

from moextend_pl.contracts import ExtensionPlan, UpcycleSpec, UserError
from moextend_pl.convert.entries import SHOWN, Entry
from moextend_pl.convert.files import TensorFiles
from moextend_pl.convert.published import OURS_LANGUAGE, OURS_PROJECTOR, OURS_TOWER, Parts
from moextend_pl.models.projector import Projector
from moextend_pl.moe.extension.growth import grow
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.upcycle import upcycle

Shape = tuple[int, ...]
ACTIVATION = "quick_gelu"
HEAD_WIDTH = 64


def joined_shapes(tensors: TensorFiles, entries: Iterable[Entry]) -> dict[str, Shape]:
    """Returns the shape of each of our tensors, without reading the published ones.

    Raises:
        UserError: If tensors that become one differ in shape.
    """
    shapes: dict[str, Shape] = {}
    for entry in entries:
        pieces = {name: tensors.shape(name) for name in entry.names}
        shape, wide = pieces[entry.names[0]], len(entry.published[0])
        other = next((name for name in pieces if pieces[name] != shape), None)
        if other is not None or (wide > 1 and not shape):
            other = other or entry.names[0]
            raise UserError(
                f"{tensors.path}: expected {entry.names[0]} and {other} in one shape, got {list(shape)} and "
                f"{list(pieces[other])}. Nothing was written; download the checkpoint anew."
            )
        rows = (shape[0] * wide, *shape[1:]) if wide > 1 else shape
        shapes[entry.ours] = (len(entry.published), *rows) if entry.stacked else rows
    return shapes


def tower_config(shapes: dict[str, Shape], experts: int, heads: int | None) -> CLIPVisionConfig:
    """Reads the configuration of a CLIP tower off its shapes.

    Args:
        shapes: By our names.
        experts: E of its blocks; 0 where they are dense.
        heads: Attention heads, which no tensor tells; by default a head has 64 channels.

    Raises:
        UserError: If they are not those of a CLIP tower, or do not divide into heads.
    """
    own = {name.removeprefix(OURS_TOWER): shape for name, shape in shapes.items() if name.startswith(OURS_TOWER)}
    names = ["embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"]
    names.append("encoder.layers.0." + ("mlp.experts.up_proj" if experts else "mlp.fc1.weight"))
    got = [own.get(name, ()) for name in names]
    if [len(shape) for shape in got] != [4, 2, 3 if experts else 2] or 0 in got[0]:
        raise UserError(f"Expected the {names} of a CLIP tower with at least one block, got the shapes {got}.")
    (width, _, _, patch), (positions, _), hidden = got
    if heads is None and width % HEAD_WIDTH:
        raise UserError(f"Expected `--heads`, as {width} channels do not divide into heads of {HEAD_WIDTH}.")
    heads = width // HEAD_WIDTH if heads is None else heads
    if heads < 1 or width % heads:
        raise UserError(f"Expected `--heads` to divide the {width} channels of the tower, got {heads}. Correct it.")
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden[-2],
        num_hidden_layers=len([name for name in own if name.endswith("self_attn.q_proj.weight")]),
        num_attention_heads=heads,
        image_size=isqrt(max(positions - 1, 1)) * patch,  # one position is the class token's
        patch_size=patch,
        hidden_act=ACTIVATION,
    )


def check_shapes(
    origin: TensorFiles,
    shapes: dict[str, Shape],
    parts: Parts,
    tower: CLIPVisionConfig | None,
    language: PreTrainedConfig | None,
    plan: ExtensionPlan | None,
    scales: int,
) -> None:
    """Refuses tensors that do not fit the model they belong to.

    Raises:
        UserError: If a shape is another one; shows the first few.
    """
    expected: dict[str, Shape] = {}
    with torch.device("meta"):
        if tower is not None:
            expected |= _shapes(_tower(tower, parts.encoder_experts), OURS_TOWER)
        if language is not None:
            expected |= _shapes(_language(language, plan), OURS_LANGUAGE)
        if parts.projector:
            width = tower.hidden_size * scales if tower else None
            narrow = int(language.hidden_size) if language else None
            projector = _projector(shapes, parts.projector_experts, width, narrow)
            expected |= _shapes(projector, OURS_PROJECTOR)
    wrong = [(entry.names[0], entry.ours) for entry in parts.entries if shapes[entry.ours] != expected.get(entry.ours)]
    if wrong:
        shown = [f"{name} (for {ours} {expected.get(ours)}, got {shapes[ours]})" for name, ours in wrong[:SHOWN]]
        raise UserError(
            f"{origin.path}: expected the shapes that config.json and the other tensors tell, got {len(wrong)} others: "
            f"{', '.join(shown)}. Nothing was written; correct config.json or download the checkpoint anew."
        )


def _shapes(module: nn.Module, prefix: str) -> dict[str, Shape]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _tower(config: CLIPVisionConfig, experts: int) -> nn.Module:
    tower = CLIPVisionModel(config)
    if experts:
        upcycle(tower, UpcycleSpec(experts=experts, top_k=1))
    return tower


def _language(config: PreTrainedConfig, plan: ExtensionPlan | None) -> nn.Module:
    model = AutoModelForCausalLM.from_config(config)
    if plan is not None:
        grow(model, plan, Reach())
    return model


def _projector(shapes: dict[str, Shape], experts: int, wide: int | None, narrow: int | None) -> nn.Module:
    first, last = ("experts.up_proj", "experts.down_proj") if experts else ("0.weight", "2.weight")
    # A part on its own can only be checked against itself.
    wide = wide or (shapes[f"{OURS_PROJECTOR}layers.{first}"] or (1,))[-1]
    narrow = narrow or (shapes[f"{OURS_PROJECTOR}layers.{last}"] or (1,))[-1]
    spec = UpcycleSpec(experts=experts, top_k=1) if experts else None
    projector = Projector(in_features=wide, out_features=narrow, upcycle=spec)
    projector.build()
    return projector
