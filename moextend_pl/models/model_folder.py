"""Transformers models in folders: their configuration, read before any weight is, and their weights, all of them.

A base may also be named as in a hub, or be a GGUF file, which is unpacked into a folder once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from moextend_pl.contracts import UpcycleSpec, UserError
from moextend_pl.moe.upcycle import upcycled_mlps
from moextend_pl.runs.atomic import write_folder
from moextend_pl.runs.fingerprints import file_sha256
from moextend_pl.runs.named import HUB_NAME, from_hub

log = logging.getLogger(__name__)

# Files at hand, none unpickled, and no code that comes with them, nor a question whether to run it.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
REASON = 240  # characters of another library's complaint
GGUF, GGUF_MAGIC = ".gguf", b"GGUF"
GGUF_PACKAGES = ("gguf", "accelerate")  # what transformers reads such a file with
# Dense families whose attention, norms and MLPs are Mixtral's.
LIKE_MIXTRAL = ("llama", "mistral")
# What a dense model's configuration says of itself and not of its sizes.
OF_THE_FAMILY = ("model_type", "architectures", "transformers_version", "dtype", "_name_or_path")
DIGITS = 16  # of a file's SHA-256, in the name of its folder


def base_folder(base: str) -> str:
    """Returns the folder of a base: as it is named, in the cache of a hub, or made of a GGUF file.

    Args:
        base: Folder, `org/name` of a hub where no folder `org` is here, or a file that ends in `.gguf`.

    Raises:
        UserError: If the hub does not have it, or the file cannot be read.
    """
    place = Path(base)
    if place.suffix == GGUF and not place.is_dir():
        return str(unpacked(place))
    if HUB_NAME.fullmatch(base) and not place.parent.exists():
        log.info("fetching %s, or taking it from the hub's cache", base)
        return str(from_hub(base))
    return base


def unpacked(file: Path) -> Path:
    """Returns the folder of a GGUF file's model, in 32 bits and with its tokenizer; made once, under `~/.cache`.

    Args:
        file: With all of a model's weights, in any type that transformers reads.

    Raises:
        UserError: If there is no such file, it is damaged, or a library is missing.
    """
    if not file.is_file():
        raise UserError(f"Expected a GGUF file at {file}, found none (cwd {Path.cwd()}). Correct the path.")
    with file.open("rb") as opened:
        if opened.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise UserError(f"{file} is no GGUF file, which begins with the letters GGUF. Download or copy it again.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moextend_pl" / "gguf"
    folder = cache / f"{file.stem}-{file_sha256(file)[:DIGITS]}"
    if (folder / "config.json").is_file():
        return folder
    if missing := [name for name in GGUF_PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"A base that is a GGUF file needs {' and '.join(missing)}, not installed: "
            'pip install "moextend_pl[gguf]", or name a folder of safetensors.'
        )
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if not (folder / "config.json").is_file():
            log.info("unpacking %s into %s, once", file, folder)
            write_folder(folder, lambda place: _unpack(file, place))
    return folder


def _unpack(file: Path, folder: Path) -> None:
    with TemporaryDirectory() as alone:
        try:
            model, config, tokenizer = _read_gguf(file, Path(alone))
        except Exception as error:  # of several libraries, and what `read_model` says of a folder
            reason = shorten(" ".join(str(error).replace(alone, "it").split()).rstrip("."), REASON)
            raise UserError(
                f"{file} is no GGUF file that the installed transformers can read ({type(error).__name__}: {reason}). "
                "Copy it again, or name a folder of safetensors."
            ) from error
    with torch.device("meta"):
        # The model that was read counts as quantised, which transformers does not write.
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_gguf(file: Path, alone: Path) -> tuple[Any, Any, Any]:
    # Read where no configuration or tokenizer of another model lies beside it, which transformers would prefer.
    (alone / file.name).symlink_to(file.resolve())
    where: dict[str, Any] = {"gguf_file": file.name, **LOCAL}
    config = AutoConfig.from_pretrained(alone, **where)
    tokenizer = AutoTokenizer.from_pretrained(alone, config=config, **where)
    options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    return (
        read_model(AutoModelForCausalLM, str(alone), config=config, gguf_file=file.name, **options),
        config,
        tokenizer,
    )


def read_config(folder: str) -> PreTrainedConfig:
    """Reads the configuration of a transformers model.

    Args:
        folder: Folder with a `config.json`.

    Raises:
        UserError: If the file is damaged, or of a model that the installed transformers does not know.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        if _brings_code(Path(folder)):
            raise UserError(
                f"{folder} brings code of its own (`auto_map` in its config.json), which is never run here, and "
                "transformers does not know such a model. Update transformers, or name another base."
            ) from error
        reason = shorten(" ".join(str(error).split()).rstrip("."), REASON)
        raise UserError(
            f"{folder}/config.json is no configuration that the installed transformers can read ({reason}). Copy the "
            "model's folder again, or update transformers."
        ) from error
    return config


def is_quantised(folder: str | None) -> bool:
    """Tells whether the weights of a transformers model are stored quantised already.

    Args:
        folder: Folder with a `config.json`; None for a new model.
    """
    return folder is not None and getattr(read_config(folder), "quantization_config", None) is not None


def read_model(kind: Any, folder: str, optional: Callable[[str], bool] = lambda _: False, **options: Any) -> Any:
    """Reads a transformers model with all its weights.

    Args:
        kind: Auto class of the model.
        folder: Whose weights were checked.
        optional: Tells of the name of a weight whether the files may lack it.
        options: Of `from_pretrained`.

    Raises:
        UserError: If the files lack weights, or have them in another shape.
    """
    try:
        model, told = kind.from_pretrained(folder, output_loading_info=True, use_safetensors=True, **LOCAL, **options)
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "mismatch" not in str(error):
            raise
        raise UserError(
            f"The weights in {folder} do not fit its config.json ({shorten(' '.join(str(error).split()), REASON)}). "
            "Copy the model's folder again."
        ) from error
    if missing := [name for name in told["missing_keys"] if not optional(name)]:
        raise UserError(
            f"The files in {folder} lack {len(missing)} weights of its {type(model).__name__}, for example "
            f"{min(missing)}, which would be random. Name the folder of a whole model."
        )
    return model


def is_like_mixtral(config: PreTrainedConfig, spec: UpcycleSpec) -> bool:
    """Tells whether an upcycled model computes what a Mixtral does, which transformers can read again.

    Args:
        config: Of the dense model.
        spec: How it is upcycled.
    """
    biases = (getattr(config, name, False) for name in ("attention_bias", "mlp_bias"))
    return config.model_type in LIKE_MIXTRAL and not any(biases) and spec.layers is None


def mixtral_config(config: PreTrainedConfig, spec: UpcycleSpec) -> MixtralConfig:
    """Returns the configuration of the Mixtral that computes what a dense model does once its MLPs are experts.

    Args:
        config: Of the dense model.
        spec: How it is upcycled, `is_like_mixtral`.
    """
    known = MixtralConfig().to_dict().keys() - set(OF_THE_FAMILY)
    values: dict[str, Any] = {key: value for key, value in config.to_dict().items() if key in known}
    values |= {"architectures": [MixtralForCausalLM.__name__], "dtype": config.dtype}
    return MixtralConfig(**{**values, "num_local_experts": spec.experts, "num_experts_per_tok": spec.top_k})


def stock_form(model: PreTrainedModel, spec: UpcycleSpec | None) -> PreTrainedModel:
    """Returns a model as transformers writes and reads it: an upcycled one as the Mixtral that computes the same.

    Args:
        model: Built; shares its weights with what is returned.
        spec: How it is upcycled, `is_like_mixtral`; None for a model that is not.
    """
    if spec is None or not upcycled_mlps(model):
        return model
    config = mixtral_config(model.config, spec)
    with torch.device("meta"):
        stock = MixtralForCausalLM(config)
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.generation_config = model.generation_config
    return stock


def _brings_code(folder: Path) -> bool:
    try:
        return "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
