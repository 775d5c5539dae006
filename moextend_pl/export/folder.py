"""A model to a folder that transformers loads: weights, configuration, processor and generation settings."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from moextend_pl.contracts import SampleSpec, UpcycleSpec, UserError
from moextend_pl.export.card import write_card
from moextend_pl.export.configuration import MoExtendConfig
from moextend_pl.export.modeling import MoExtendForConditionalGeneration
from moextend_pl.export.processing import NOT_PIXELS, MoExtendImageProcessor, MoExtendProcessor
from moextend_pl.export.travelling_code import AUTO_MAP, write_code
from moextend_pl.inference.decoding import context_of, end_tokens, longest_answer
from moextend_pl.models.feature_cache import ENCODE_TOGETHER
from moextend_pl.models.model_folder import read_config
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.extension.reach import check_task
from moextend_pl.runs.manifest import read_manifest
from moextend_pl.training.half_precision import default_dtype

OURS, THEIRS = "language.model.", "language_model."
SHARD = "5GB"
USE = """```python
import moextend_pl  # or give trust_remote_code=True below: the code is in this folder
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
parts = [{"type": "image", "path": "shape.png"}, {"type": "text", "text": "what color is the shape?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": parts}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
processor.decode(answer, skip_special_tokens=True)
```"""
"""How an exported folder is used, for its card."""


def configuration_of(model: MoExtend, task: str = "") -> MoExtendConfig:
    """Returns the configuration of a built model as it is exported.

    Args:
        model: Built.
        task: Name of the task of all questions, where the model was extended for several.
    """
    encoder, projector, language = model.encoder, model.projector, model.language
    facts: dict[str, Any] = {
        "name": str(encoder.config["name"]) if encoder.is_timm else "",
        "tower_args": encoder.config.get("tower_args") or {},
        "config": None if encoder.is_timm else _plain(read_config(encoder.folder)),
        **{name: encoder.config[name] for name in ("layer", "pool", "scales", "reference")},
        "grid_side": encoder.grid_side,
        "together": ENCODE_TOGETHER,
        "upcycle": _spec(encoder.upcycle_spec),
    }
    if encoder.is_timm:
        facts["name"] = facts["name"].removeprefix("timm/")
    names = ("depth", "merge", "in_features", "out_features", "cross_attention", "thumbnail")
    tags = None if projector.tags is None else projector.tags.tolist()
    config = MoExtendConfig(
        text_config=_plain(language.model.config),
        encoder=facts,
        projector={name: getattr(projector, name) for name in names}
        | {"upcycle": _spec(projector.upcycle_spec), "tags": tags},
        upcycle=_spec(language.upcycle_spec),
        plans=[{**plan.to_dict(), "report": {}} for plan in model.plans],
        image_token_id=language.image_token_id,
        context=context_of(language.model.config),
        task=task,
    )
    config.dtype = read_dtype(model)
    return config


def read_dtype(model: MoExtend) -> torch.dtype:
    """Returns the type of the weights of a model."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _spec(spec: UpcycleSpec | None) -> dict[str, Any] | None:
    return None if spec is None else asdict(spec)


def _plain(config: Any) -> dict[str, Any]:
    """Returns a configuration as plain data, without where it came from."""
    dropped = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")
    return {name: value for name, value in config.to_dict().items() if name not in dropped}


def exported(model: MoExtend, task: str = "") -> MoExtendForConditionalGeneration:
    """Returns a built model as one of transformers; the two share their weights.

    Args:
        model: Built.
        task: As in `configuration_of`.

    Raises:
        UserError: If its base is in 4 bits, or questions would need another task.
    """
    if model.hearing is not None:
        raise UserError("Expected a model that does not hear, got one with `hearing`; no exported folder has it yet.")
    if model.language.compute.quantize is not None:
        raise UserError(
            f"Expected a run whose base has 16 or 32 bits, got `quantize: {model.language.compute.quantize}`: the "
            "folder would hold other weights than those that were trained on. Train the stage without `quantize`."
        )
    check_task(model.plans, task, has_image=True)
    with torch.device("meta"), default_dtype(read_dtype(model)):
        copy = MoExtendForConditionalGeneration(configuration_of(model, task))
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    named = {name.replace(OURS, THEIRS, 1) if name.startswith(OURS) else name: t for name, t in tensors.items()}
    held = copy.state_dict().keys()
    if missing := sorted(held - named.keys()):
        raise UserError(f"Expected a model of known parts, got one without {missing[:3]}. Export it from its own run.")
    copy.load_state_dict({name: named[name].detach() for name in held}, assign=True)
    for name, buffer in list(copy.named_buffers()):
        if buffer.is_meta:  # not in the state, such as rotary frequencies
            path, _, last = name.rpartition(".")
            copy.get_submodule(path).register_buffer(last, named[name], persistent=False)
    copy.tie_weights()
    copy.generation_config = generation_of(model)
    return copy


def generation_of(model: MoExtend) -> GenerationConfig:
    """Returns how answers are generated where a caller says nothing: greedily, as `MoExtend.generate` does."""
    language = model.language
    ends = end_tokens(language.model, language.tokenizer)
    return GenerationConfig(
        do_sample=False,
        bos_token_id=language.tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=language.tokenizer.pad_token_id,
        max_new_tokens=longest_answer(language.model, language.generation),
    )


def processor_of(spec: SampleSpec) -> MoExtendProcessor:
    """Returns the processor for a model.

    Args:
        spec: What the model asks of its data.
    """
    pixels = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in NOT_PIXELS}
    return MoExtendProcessor(
        MoExtendImageProcessor(pixels=pixels),
        spec.tokenizer,
        image_token_id=spec.image_token_id,
        tokens_per_image=spec.tokens_per_image,
        context=spec.context,
    )


def write_model(model: MoExtend, folder: Path, task: str = "", shard: str = SHARD) -> None:
    """Writes a model as transformers does.

    Args:
        model: Built.
        folder: New or empty.
        task: As in `configuration_of`.
        shard: Largest file of weights.
    """
    whole, processor = exported(model, task), processor_of(model.sample_spec())
    known: dict[str, Any] = {
        "AutoConfig": whole.config,
        "AutoModelForImageTextToText": whole.config,
        "AutoProcessor": processor,
        "AutoImageProcessor": processor.image_processor,
    }
    for name, each in known.items():
        each.auto_map = {**getattr(each, "auto_map", {}), name: AUTO_MAP[name]}
    # Names as they are in memory: base weights keep them where layers are extended, and the others then too.
    whole.save_pretrained(folder, max_shard_size=shard, save_original_format=False)
    processor.save_pretrained(folder)
    write_code(folder)


def export_run(run: Path, folder: Path, task: str = "", shard: str = SHARD, base: str | Path | None = None) -> None:
    """Writes the model of a finished run, and its card.

    Args:
        run: Run directory.
        folder: New or empty.
        task: As in `configuration_of`.
        shard: Largest file of weights.
        base: Where the base lies, if not where the run says.

    Raises:
        UserError: If there is no finished run, or it cannot be exported.
    """
    manifest = read_manifest(run)
    manifest.check_hears_not("an exported folder")
    write_model(MoExtend.load(run, base), folder, task, shard)
    write_card(manifest, folder, USE, manifest.bases.get("language", {}).get("name"))
