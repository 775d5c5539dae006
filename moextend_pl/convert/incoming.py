"""Published checkpoints to a run directory of this project.

The result holds `encoder/` and `language/`, as a config names them, and `delta.safetensors` with
`manifest.json`, from which a stage starts (`init_from`) and `MoExtend.load` loads.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from moextend_pl.contracts import PLAN_FILE, ExtensionPlan, LayerGrowth, UpcycleSpec, UserError
from moextend_pl.convert.entries import check_names
from moextend_pl.convert.files import TensorFiles, write_shards, write_tensors
from moextend_pl.convert.published import OURS_TOWER, Parts, holds_language, read_parts
from moextend_pl.convert.shapes import check_shapes, joined_shapes, tower_config
from moextend_pl.models.encoder import CONFIG_FILE, WEIGHTS_FILE
from moextend_pl.models.tower import PREPROCESSOR_FILE
from moextend_pl.runs.atomic import write_json
from moextend_pl.runs.fingerprints import file_sha256
from moextend_pl.runs.manifest import DELTA_FILE, Manifest, versions
from moextend_pl.samples.squares import PAD

REPORT = "conversion.json"
PUBLISHED_CONFIG = "published_config.json"
KINDS = ("mistral", "mixtral")
LAYER = {"cumo": -2, "moextend": -1}
# Names that published files have for what transformers v5 calls otherwise; the configuration classes read them.
LEGACY_NAMES = ("rope_theta", "rope_scaling", "torch_dtype")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


def language_config(data: dict[str, Any]) -> PreTrainedConfig:
    """Returns the configuration of the language model alone, out of a published `config.json`.

    Raises:
        UserError: If it is of another model, or has values that cannot be.
    """
    kind = str(data.get("model_type", "")).removeprefix("llava_")
    if kind not in KINDS:
        names = [prefix + name for prefix in ("", "llava_") for name in KINDS]
        raise UserError(
            f"Expected `model_type` in config.json to be one of {names}, got {data.get('model_type')!r}. "
            "Other language models have no published layout to read."
        )
    # Not all of it: the class would read CuMo's `num_experts`, that of the tower, as its own.
    known = {*AutoConfig.for_model(kind).to_dict(), *LEGACY_NAMES}
    kept = {name: value for name, value in data.items() if name in known and name != "model_type"}
    try:
        return AutoConfig.for_model(kind, **kept)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Expected the values of a {kind} in config.json, got: {reason}. Correct the file.") from error


def convert_in(source: Path, target: Path, layout: str, heads: int | None = None) -> dict[str, Any]:
    """Converts a published checkpoint; names and shapes are checked before anything is written, the report comes last.

    Args:
        source: A file or a folder.
        target: Run directory to make.
        layout: `cumo` or `moextend`.
        heads: Attention heads of the tower, which its tensors do not tell; by default a head has 64 channels.

    Returns:
        The report: what every tensor became.

    Raises:
        UserError: If tensors are missing, unexpected or not as the layout has them.
    """
    tensors = TensorFiles(source)
    data = tensors.config()
    # The file of one part may lie beside the config.json of a whole model.
    config = language_config(data) if data and holds_language(tensors) else None
    parts = read_parts(tensors, config, layout)
    check_names((name for entry in parts.entries for name in entry.names), tensors, str(source))
    shapes = joined_shapes(tensors, parts.entries)
    tower = tower_config(shapes, parts.encoder_experts, heads) if parts.encoder else None
    scales = list(data.get("scales") or ([1, 3] if layout == "cumo" else [1]))
    plan = _plan(parts)
    check_shapes(tensors, shapes, parts, tower, config, plan, len(scales))
    model: dict[str, dict[str, Any]] = {}
    if tower is not None:
        own = {"scales": scales, "upcycle": _upcycling(parts.encoder_experts, data)}
        _write_encoder(tensors, parts, target / "encoder", tower, {**own, "layer": LAYER[layout]})
        model["encoder"] = {"path": "encoder", **own}
    if parts.projector:
        spec = _upcycling(parts.projector_experts, data)
        model["projector"] = {"kind": "mlp2x_gelu", "merge": 1, "upcycle": spec}
    if config is not None:
        _write_language(tensors, parts, tensors.folder, target / "language", config)
        write_json(target / PUBLISHED_CONFIG, data)
        model["language"] = {"base": "language", "dense": config.model_type == "mistral", "upcycle": None}
    _write_run(tensors, parts, target, model, plan)
    report = {
        "layout": layout,
        "from": source.name,
        "tensors": [{**entry.line(), "dtype": str(tensors[entry.names[0]].dtype)} for entry in parts.entries],
    }
    write_json(target / REPORT, report)
    return report


def _upcycling(experts: int, data: dict[str, Any]) -> dict[str, Any] | None:
    if not experts:
        return None
    spec = UpcycleSpec(
        experts=experts,
        top_k=int(data.get("num_selected", 2)),
        balance=float(data.get("balance_loss_coef", 0.1)),
        z=float(data.get("router_z_loss_coef", 0.01)),
    )
    return asdict(spec)


def _write_encoder(
    tensors: TensorFiles, parts: Parts, folder: Path, config: CLIPVisionConfig, own: dict[str, Any]
) -> None:
    weights = {entry.ours.removeprefix(OURS_TOWER): entry.join(tensors) for entry in parts.encoder}
    write_tensors(weights, folder / WEIGHTS_FILE)
    config.save_pretrained(folder)
    write_json(folder / PREPROCESSOR_FILE, {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD})
    # As LLaVA-1.5's scripts and CuMo's train on instructions.
    facts = {"name": "clip", "pool": 1, "image_size": config.image_size, "tower_args": {}, "resize": PAD}
    write_json(folder / CONFIG_FILE, {**facts, **own})


def _write_language(tensors: TensorFiles, parts: Parts, source: Path, folder: Path, config: PreTrainedConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # In the published names, which transformers reads by itself.
    names = (name for entry in parts.language for name in entry.names)
    write_shards(((name, tensors[name]) for name in names), folder)
    config.architectures = [f"{config.model_type.capitalize()}ForCausalLM"]
    config.save_pretrained(folder)
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copy2(file, folder)


def _plan(parts: Parts) -> ExtensionPlan | None:
    if not parts.extended:
        return None
    # Sources only say where new weights start from; these have been trained, and theirs are not published.
    layers = tuple(LayerGrowth(layer, (0,) * count) for layer, count in sorted(parts.extended.items()))
    return ExtensionPlan(layers=layers, init="copy", routing="open", report={"origin": "converted"})


def _write_run(
    tensors: TensorFiles, parts: Parts, target: Path, model: dict[str, dict[str, Any]], plan: ExtensionPlan | None
) -> None:
    new = [*parts.projector, *parts.extension]
    if plan is not None:
        plan.save(target / PLAN_FILE)
    write_tensors({entry.ours: entry.join(tensors) for entry in new}, target / DELTA_FILE)
    Manifest(
        plans=(plan,) if plan else (),
        model=model,
        trained=[entry.ours for entry in new],
        frozen={},
        delta_sha256=file_sha256(target / DELTA_FILE),
        versions=versions(),
        run=target,
    ).save()
