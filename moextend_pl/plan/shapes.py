"""Reads off a built model what the arithmetic of costs needs: sizes, widths, and what learns.

Works on models of the meta device, which have shapes and no values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moextend_pl.contracts import UserError
from moextend_pl.distillation.distill import Distill
from moextend_pl.models.delta import delta_tensors
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.blocks import MoEBlock, list_blocks
from moextend_pl.moe.dispatch import meant_for_kernels, takes
from moextend_pl.plan.cost import NF4_BYTES
from moextend_pl.plan.facts import Layer, Matrix, ModelShape, Norm, Part, Stack
from moextend_pl.plan.networks import measure_projector, measure_tower
from moextend_pl.plan.stage_model import read_teacher
from moextend_pl.samples.tiling.tiles import Tiling
from moextend_pl.training.sharding.units import parameters_by_unit
from moextend_pl.training.stage import StageModule

TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def read_shape(module: StageModule, compute_bytes: int, mixed: torch.dtype | None = None) -> ModelShape:
    """Reads the shape of a model, and of the teacher beside it.

    Args:
        module: Built, grown and frozen as a run would, on the meta device or any other.
        compute_bytes: Bytes of one value outside the experts.
        mixed: Type in which autocast computes; None without it.
    """
    alone = _read_shape(module, compute_bytes, mixed)
    if not isinstance(module, Distill):
        return alone
    teacher = read_teacher(module)
    taught = _read_shape(teacher, compute_bytes, mixed)
    nf4 = (teacher.language if isinstance(teacher, MoExtend) else teacher).compute.quantize == "nf4"
    held = not module.teacher.spec.is_own_base  # else it is there already
    return replace(
        alone,
        parts=(*alone.parts, _teacher_part(taught, nf4)) if held else alone.parts,
        buffer_bytes=alone.buffer_bytes + held * taught.buffer_bytes,
        asks_pictures=any(term.needs_logits and term.scopes & {"image", "all"} for term in module.terms),
        teacher=taught,
    )


def _teacher_part(taught: ModelShape, nf4: bool) -> Part:
    """Returns a teacher as one frozen part, which every process holds as a whole."""
    size, count = (sum(getattr(part, name) for part in taught.parts) for name in ("bytes", "parameters"))
    saved = nf4 * sum(part.quantisable * (part.bytes / part.parameters - NF4_BYTES) for part in taught.parts)
    kinds = ",".join(sorted({kind for part in taught.parts for kind in part.dtype.split(",")}))
    return Part("teacher", count, 0, round(size - saved), 0, 0, "nf4" if nf4 else kinds, quantisable=0)


def _read_shape(module: StageModule, compute_bytes: int, mixed: torch.dtype | None = None) -> ModelShape:
    language = getattr(module, "language", module if isinstance(module, MoELanguageModel) else None)
    encoder = getattr(module, "encoder", module if isinstance(module, VisionEncoder) else None)
    layers = _layers(language, compute_bytes) if language is not None else ()
    model: Any = getattr(language, "model", None)
    tokens = _tokens_per_image(module)  # first: it says in words what a forward pass would only stumble over
    tower, features = measure_tower(encoder, mixed) if encoder is not None else (None, None)
    whole = module if isinstance(module, MoExtend) else None
    tiles = Tiling.parse(whole.encoder.config["tiles"]).most_squares if whole is not None else 1
    delta = delta_tensors(whole).values() if whole is not None else module.parameters()
    units = parameters_by_unit(model) if model is not None else []
    return ModelShape(
        parts=_parts(module, model),
        buffer_bytes=sum(_bytes(buffer) for buffer in module.buffers()),
        layers=layers,
        final_norm=_final_norm(model) if model is not None else None,
        head=_matrix(model.get_output_embeddings(), "head") if model is not None else None,
        embeddings_learn=model is not None and _learns(model.get_input_embeddings()),
        tower=tower,
        projector=measure_projector(whole.projector, features, mixed) if whole and features is not None else None,
        tokens_per_image=tokens,
        tiles=tiles,
        looked_at=tiles - whole.projector.thumbnail if whole is not None and whole.projector.cross_attention else 0,
        delta_bytes=sum(map(_bytes, delta)),
        unit_bytes=max((sum(map(_bytes, unit)) for unit in units), default=0),
        unit_learning_bytes=max((sum(_bytes(p) for p in unit if p.requires_grad) for unit in units), default=0),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _parts(module: StageModule, model: nn.Module | None) -> tuple[Part, ...]:
    is_packed = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    found = {id(p) for p in _quantisable(model)} if model is not None and not is_packed else set()
    units = parameters_by_unit(model) if isinstance(model, PreTrainedModel) else []
    parts, cut = [], {parameter for unit in units for parameter in unit}
    stacks = [getattr(block.experts, "root", block.experts) for block in (list_blocks(model) if model else ())]
    experts = {p for stack in stacks for p in stack.parameters(recurse=False)}
    for name, parameters in module.parts().items():
        matrices = found if name == "language" else set()
        learning = [p for p in parameters if p.requires_grad]
        part = Part(
            name=name,
            parameters=sum(p.numel() for p in parameters),
            learning=sum(p.numel() for p in learning),
            bytes=sum(map(_bytes, parameters)),
            learning_bytes=sum(map(_bytes, learning)),
            learning_tensors=len(learning),
            dtype=",".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            quantisable=sum(p.numel() for p in parameters if id(p) in matrices and not p.requires_grad)
            * (name == "language"),
            cut=sum(_bytes(p) for p in parameters if p in cut),
            cut_learning=sum(_bytes(p) for p in learning if p in cut),
            experts=sum(_bytes(p) for p in parameters if p in experts),
        )
        parts += [part] if parameters else []
    return tuple(parts)


def _quantisable(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yields linear layers and stacks of experts inside the decoder layers; embeddings, head and routers stay whole."""
    for layer in _decoder(model):
        for module in layer.modules():
            # A single output is a gate, which `quantize` leaves whole as it does routers.
            if isinstance(module, nn.Linear) and module.out_features > 1:
                yield module.weight
            yield from (p for p in module.parameters(recurse=False) if p.dim() == 3)


def _decoder(model: Any) -> list[nn.Module]:
    """Returns the decoder layers, those without experts included."""
    blocks = list_blocks(model)
    if not blocks:
        count = model.config.get_text_config().num_hidden_layers
        return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    names = blocks[0].path.split(".")
    place = max(n for n, name in enumerate(names) if name.isdigit())
    return list(model.get_submodule(".".join(names[:place])).children())


def _matrix(linear: nn.Module, reads: str, inputs: int | None = None) -> Matrix:
    weight: Any = linear.weight
    return Matrix(weight.numel(), weight.shape[-1] if inputs is None else inputs, reads, weight.requires_grad)


def _final_norm(model: nn.Module) -> Norm | None:
    inside = {id(module) for layer in _decoder(model) for module in layer.modules()}
    outside = [m for m in model.modules() if type(m).__name__.endswith("Norm") and id(m) not in inside]
    weight: Any = outside[-1].weight if outside else None
    return None if weight is None else Norm(weight.numel(), weight.requires_grad)


def _layers(language: MoELanguageModel, compute_bytes: int) -> tuple[Layer, ...]:
    model = language.model
    blocks = {block.layer: block for block in list_blocks(model)}
    top_k = _top_k(language)
    config = model.config.get_text_config()
    layers = _decoder(model)
    return tuple(_layer(layer, blocks.get(n), top_k, config, compute_bytes) for n, layer in enumerate(layers))


def _layer(layer: nn.Module, block: MoEBlock | None, top_k: int, config: Any, compute_bytes: int) -> Layer:
    inside = {id(module) for module in block.module.modules()} if block is not None else set()
    linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    mixer = tuple(_mixer_matrix(name, m) for name, m in linears.items() if id(m) not in inside)
    shared = {name: m for name, m in linears.items() if id(m) in inside}
    mlps = [m for name, m in linears.items() if id(m) in inside or "attn" not in name]
    heads = int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    common: dict[str, Any] = {
        "width": int(config.hidden_size),
        "mixer": mixer,
        "inner": sum(m.in_features if m.out_features == config.hidden_size else m.out_features for m in mlps),
        "norms": tuple(_norms(layer, heads * head, int(config.num_key_value_heads) * head)),
        "scores": heads * int(getattr(config, "qk_head_dim", None) or head),
        "values": heads * int(getattr(config, "v_head_dim", None) or head),
        "heads": heads,
    }
    if block is None:
        return Layer(mlp=(), **common)
    calibrations = [p for m in block.router.modules() for p in m.parameters(recurse=False) if p.dim() == 2]
    routed, width = block.num_experts, int(config.hidden_size)
    rows = [p for p in calibrations if p.shape[-1] == width]
    return Layer(
        mlp=(
            *(_matrix(m, name if m.out_features == width else "mlp") for name, m in shared.items()),
            *_router_matrices(rows),
        ),
        stacks=tuple(_stacks(block.experts, width, compute_bytes)),
        top_k=top_k,
        routed=routed,
        correction=sum(len(p) for p in calibrations if p.shape[-1] == routed),
        router_learns=_learns(block.router),
        kernels=meant_for_kernels(getattr(block.experts, "root", block.experts), torch.device("cuda")),
        **common,
    )


def _top_k(language: MoELanguageModel) -> int:
    if language.dense or language.upcycle_spec is not None:
        return language.upcycle_spec.top_k if language.upcycle_spec is not None else 0
    config = language.model.config.get_text_config()
    for name in TOP_K_NAMES:
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    raise UserError(f"Expected one of {list(TOP_K_NAMES)} in the model's config, got none: its costs are not known.")


def _mixer_matrix(name: str, linear: nn.Linear) -> Matrix:
    # The output of attention is saved by attention itself; what other matrices read, only if they learn.
    block, _, own = name.rpartition(".")
    return _matrix(linear, name if own.startswith("down") else block, 0 if own.startswith("o") else None)


def _router_matrices(rows: list[nn.Parameter]) -> Iterator[Matrix]:
    """Yields the products of a router: that of the base, and one over old and new rows for each extension."""
    seen = 0
    for weight in sorted(rows, key=len, reverse=True):
        seen += weight.numel()
        yield Matrix(seen, weight.shape[-1], "mlp", weight.requires_grad)


def _norms(layer: nn.Module, queries: int, keys: int) -> Iterator[Norm]:
    for name, module in layer.named_modules():
        weight: Any = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and weight is not None:
            width = queries if "q_norm" in name else keys if "k_norm" in name else weight.numel()
            yield Norm(width, weight.requires_grad)


def _stacks(experts: nn.Module, width: int, compute_bytes: int) -> Iterator[Stack]:
    """Yields the stacks of a block, the base's first; what an extension added lies under the name `new`."""
    for name, module in experts.named_modules():
        stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if stacked:
            count = len(stacked[0])
            weights = sum(p[0].numel() for p in stacked)
            inner = min(p[0].numel() for p in stacked) // width
            size = max(p.element_size() for p in stacked)
            is_new = name.split(".")[-1] == "new"
            bytes_each, learns = max(size, compute_bytes), _learns_any(stacked)
            yield Stack(count, weights, width, inner, bytes_each, is_new, learns, lean=takes(module))


def _learns_any(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def _tokens_per_image(module: StageModule) -> int:
    if isinstance(module, MoExtend):
        return module.projector.tokens_per_image(module.encoder.tokens_per_image)
    return 0
