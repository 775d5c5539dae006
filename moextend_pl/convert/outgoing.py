"""Run directories of this project to the published layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moextend_pl.contracts import UpcycleSpec, UserError
from moextend_pl.convert.entries import Entry, check_names, clip_entries, projector_entries, same
from moextend_pl.convert.files import TensorFiles, write_shards, write_tensors
from moextend_pl.convert.incoming import LAYER, PUBLISHED_CONFIG, REPORT
from moextend_pl.convert.published import (
    OURS_PROJECTOR,
    OURS_TOWER,
    PROJECTOR_PREFIX,
    TOWER_PREFIX,
    extension_entries,
    language_entries,
)
from moextend_pl.convert.shapes import ACTIVATION
from moextend_pl.models.delta import encoder_arguments
from moextend_pl.models.encoder import WEIGHTS_FILE, VisionEncoder
from moextend_pl.models.model_folder import read_config
from moextend_pl.models.tower import make_tower, vision_config
from moextend_pl.moe.dense_mlp import DenseMLP
from moextend_pl.moe.upcycle import UpcycledMLP
from moextend_pl.runs.atomic import write_json
from moextend_pl.runs.manifest import Manifest, read_manifest


def convert_out(source: Path, target: Path, layout: str) -> dict[str, Any]:
    """Writes a run in a published layout: a whole model, or without a language model `clip.bin` and `mm_projector.bin`.

    Args:
        source: Run directory, converted or trained here.
        target: Folder to make.
        layout: `cumo` or `moextend`.

    Returns:
        The report: what every tensor became.

    Raises:
        UserError: If the run holds what the layout has no place for.
    """
    manifest = read_manifest(source)
    delta = dict(TensorFiles(manifest.delta()))
    encoder = _encoder(manifest, layout)
    tower = {} if encoder is None else whole_tower(encoder, delta)
    whole = "language" in manifest.model
    files = {"clip.bin": [] if encoder is None else _tower_entries(tower, encoder, layout, whole)}
    if "projector" in manifest.model:
        experts = (manifest.model["projector"].get("upcycle") or {}).get("experts", 0)
        files["mm_projector.bin"] = projector_entries(experts, PROJECTOR_PREFIX[layout], OURS_PROJECTOR)
    language, extension = _language(manifest) if whole else ([], [])
    entries = [entry for part in (*files.values(), extension) for entry in part]
    have = {**tower, **{name: t for name, t in delta.items() if not name.startswith(OURS_TOWER)}}
    learned = {entry.ours for entry in language} & have.keys()
    check_names((entry.ours for entry in entries), have.keys() - learned, str(source))
    config = _config(source, manifest, layout, encoder) if whole else {}
    target.mkdir(parents=True, exist_ok=True)
    if whole:
        write_shards(_whole_model(manifest, entries, language, have), target)
        write_json(target / "config.json", config)
    for file, part in files.items() if not whole else []:
        if part:
            write_tensors(
                {name: t for entry in part for name, t in entry.split(have[entry.ours]).items()}, target / file
            )
    report = {"layout": layout, "from": source.name, "tensors": [entry.line() for entry in (*entries, *language)]}
    write_json(target / REPORT, report)
    return report


def _encoder(manifest: Manifest, layout: str) -> VisionEncoder | None:
    """Returns the tower of a run before it is built, None where it has none; refuses one of another layout."""
    if "encoder" not in manifest.model:
        return None
    arguments = dict(manifest.model["encoder"])
    arguments["path" if arguments.get("path") else "name"] = str(manifest.folder("encoder"))
    encoder = VisionEncoder(
        **encoder_arguments({**arguments, "upcycle": UpcycleSpec.from_dict(arguments.get("upcycle"))})
    )
    if encoder.upcycle_spec is not None and layout != "cumo":
        raise UserError(f"{manifest.run}: the tower is upcycled, for which the layout {layout} has no place. Use cumo.")
    config = None if encoder.is_timm else vision_config(encoder.folder)
    expected = ("clip_vision_model", ACTIVATION, LAYER[layout], 1)
    model, activation = getattr(config, "model_type", "timm"), getattr(config, "hidden_act", None)
    got = (model, activation, encoder.config["layer"], encoder.config["pool"])
    if got != expected:
        raise UserError(
            f"{manifest.run}: expected a tower whose model, activation, `layer` and `pool` are {expected}, as the "
            f"layout {layout} has it, got {got}; such a tower has no published form."
        )
    return encoder


def whole_tower(encoder: VisionEncoder, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a tower that is not built: those of its files, and what a run learned in their place.

    Blocks that were not upcycled, as those that nothing reads, become copies of their dense MLP where others were:
    the published layout has experts in all. They compute what they did; their routers are as `upcycle` draws them.
    """
    if encoder.path is not None:
        stored = dict(TensorFiles(encoder.path / WEIGHTS_FILE))
    else:
        stored = make_tower(encoder.folder, with_weights=True).state_dict()
    learned = {name: tensor for name, tensor in delta.items() if name.startswith(OURS_TOWER)}
    upcycled = {name.partition("mlp.experts.")[0] for name in learned if "mlp.experts." in name}
    tensors = {OURS_TOWER + name: tensor for name, tensor in stored.items()}
    # The dense MLPs whose place the experts took.
    tensors = {name: t for name, t in tensors.items() if name.partition("mlp.fc")[0] not in upcycled} | learned
    spec = encoder.upcycle_spec
    for layer in range(vision_config(encoder.folder).num_hidden_layers if spec else 0):
        mlp = f"{OURS_TOWER}encoder.layers.{layer}.mlp."
        if spec is not None and f"{mlp}fc1.weight" in tensors:
            dense = DenseMLP(_take_linear(tensors, f"{mlp}fc1."), _take_linear(tensors, f"{mlp}fc2."), nn.Identity())
            copies = UpcycledMLP(dense, replace(spec, from_scratch=False), layer).state_dict()
            tensors.update({mlp + name: tensor for name, tensor in copies.items()})
    return tensors


def _take_linear(tensors: dict[str, Tensor], prefix: str) -> nn.Linear:
    weight, bias = tensors.pop(f"{prefix}weight"), tensors.pop(f"{prefix}bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return linear


def _tower_entries(tower: Mapping[str, Tensor], encoder: VisionEncoder, layout: str, whole: bool) -> list[Entry]:
    experts = encoder.upcycle_spec.experts if encoder.upcycle_spec else 0
    prefix = TOWER_PREFIX[layout] if whole else "vision_model."
    entries = clip_entries(vision_config(encoder.folder).num_hidden_layers, experts, prefix, OURS_TOWER)
    last = [name for name in tower if name.startswith(f"{OURS_TOWER}post_layernorm.")]
    return entries + [same(name, prefix + name.removeprefix(OURS_TOWER)) for name in last]


def _language(manifest: Manifest) -> tuple[list[Entry], list[Entry]]:
    """Returns the entries of the language model and of its extension."""
    config = read_config(str(manifest.folder("language")))
    if len(manifest.plans) > 1:
        raise UserError(
            f"{manifest.run} was extended {len(manifest.plans)} times; the published layout has place for one."
        )
    grown = manifest.plans[0].layers if manifest.plans else ()
    added = [extension_entries(growth.layer, config.num_local_experts, len(growth.sources)) for growth in grown]
    return language_entries(config, [growth.layer for growth in grown]), [entry for part in added for entry in part]


def _whole_model(
    manifest: Manifest, entries: list[Entry], language: list[Entry], have: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for entry in entries:
        yield from entry.split(have[entry.ours]).items()
    files = TensorFiles(manifest.folder("language"))
    check_names((name for entry in language for name in entry.names), files, str(files.path))
    for entry in language:
        if entry.ours in have:
            yield from entry.split(have[entry.ours]).items()
        else:
            yield from ((name, files[name]) for name in entry.names)


def _config(source: Path, manifest: Manifest, layout: str, encoder: VisionEncoder | None) -> dict[str, Any]:
    """Returns the published `config.json`: as it was converted, or made from what the run says."""
    published = source / PUBLISHED_CONFIG
    file = published if published.is_file() else manifest.folder("language") / "config.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if published.is_file() or layout != "cumo":
        return data
    specs = [UpcycleSpec.from_dict(manifest.model.get(part, {}).get("upcycle")) for part in ("encoder", "projector")]
    weights = {(spec.top_k, spec.balance, spec.z) for spec in specs if spec}
    if len(weights) > 1:
        raise UserError(
            f"{source}: expected the same `top_k`, `balance` and `z` of tower and projector, got {sorted(weights)}; "
            "the published layout has place for one of each."
        )
    names = ("num_selected", "balance_loss_coef", "router_z_loss_coef")
    own = dict(zip(names, *weights, strict=True)) if weights else {}
    own |= {"clip_smoe": specs[0] is not None, "mlp_smoe": specs[1] is not None}
    own |= {"scales": encoder.config["scales"]} if encoder else {}
    return {**data, **own, "model_type": f"llava_{data['model_type']}"}
