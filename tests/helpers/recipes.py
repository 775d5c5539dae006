"""What the recipes of CuMo find when their earlier stages are done and their models are downloaded, at tiny size."""

from __future__ import annotations

import shutil
from pathlib import Path

from helpers.tiny_world import TinyWorld
from transformers import CLIPVisionConfig, CLIPVisionModel

from moextend_pl.contracts import TrainPlan
from moextend_pl.models.delta import encoder_arguments, language_arguments, save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.runs.atomic import write_json

CLIP = Path("models/clip-vit-large-patch14-336")
BASES = {"cumo_mistral_7b": "Mistral-7B-Instruct-v0.2", "cumo_mixtral_8x7b": "Mixtral-8x7B-Instruct-v0.1"}
DATA = ("llava_558k", "allava_caption", "cumo_1649k")


def _save_runs(runs: dict[Path, list[str]], encoder: dict, language: dict) -> None:
    model = MoExtend(
        encoder=VisionEncoder(**encoder_arguments(encoder)),
        projector=Projector(kind="mlp2x_gelu"),
        language=MoELanguageModel(**language_arguments(language)),
    )
    model.configure_model()
    for run, parts in runs.items():
        for name, parameters in model.parts().items():
            for parameter in parameters:
                parameter.requires_grad_(name in parts)
        model.train_plan = TrainPlan(tuple(parts))
        save_delta(model, run)


def lay_out_cumo(world: TinyWorld, root: Path, with_runs: bool = True) -> None:
    """Writes models, data and earlier runs under a folder, which has to be the working directory.

    Args:
        world: The tiny world.
        root: The working directory.
        with_runs: Whether stages 1 and 2 seem to be done.
    """
    # A grid of 2 x 2, so that nine tiles of 336 pixels cost nothing.
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=336, patch_size=168)).save_pretrained(root / CLIP)
    write_json(root / CLIP / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    quickstart = root / "runs" / "quickstart" / "cumo"
    shutil.copytree(world.vit, quickstart / "0_vision" / "encoder")
    shutil.copytree(world.dense, quickstart / "0_language" / "base")
    for name in DATA:
        for split, copied in (("train", "train"), ("val", "test")):
            shutil.copytree(world.data("mixed", copied), root / "data" / name / split)
    for recipe, base in BASES.items():
        shutil.copytree(world.dense if "mistral" in recipe else world.base, root / "models" / base)
    if not with_runs:
        return
    tiny = {"base": str(quickstart / "0_language" / "base"), "dense": True}
    vit = {"path": str(quickstart / "0_vision" / "encoder"), "scales": [1, 2]}
    whole = ["encoder", "projector", "language"]
    _save_runs({quickstart / "1_pretrain": ["projector"], quickstart / "2_prefinetune": whole}, vit, tiny)
    for recipe, base in BASES.items():
        clip = {"name": str(root / CLIP), "layer": -2, "image_size": 336, "scales": [1, 3]}
        language = {"base": str(root / "models" / base), "dense": "mistral" in recipe}
        runs = root / "runs" / recipe
        parts = whole if language["dense"] else [*whole, "routers"]
        _save_runs({runs / "1_pretrain": ["projector"], runs / "2_prefinetune": parts}, clip, language)
