"""NVLM: pictures as tiles through data, training, answers and, where they stand among the words, export."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.stages import write_stage
from helpers.tiles import SIZES, as_file, photo, tiled, write_many_shapes, write_tagged_base
from helpers.tiny_world import QUESTION, TinyWorld
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from datamodules import ImageTextShards
from datamodules.options import RowSpec
from moextend_pl import cli
from moextend_pl.contracts import TrainPlan
from moextend_pl.export.folder import write_model
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.checkpoint import CHECKPOINT_FOLDER


@pytest.fixture(scope="module")
def base(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tagged_base(tiny_world, tmp_path_factory.mktemp("tagged") / "base")


def built(world: TinyWorld, base: str) -> MoExtend:
    model = tiled(world, base)
    model.train_plan = TrainPlan(())
    model.configure_model()
    return model.eval()


@pytest.mark.parametrize("looks", [0, 1], ids=["D", "H"])
def test_lengths_of_packed_rows_are_those_of_the_samples(
    tiny_world: TinyWorld, base: str, tmp_path: Path, looks: int
) -> None:
    spec = tiled(tiny_world, base, looks=looks, thumbnail=looks > 0).sample_spec()
    folder = write_many_shapes(tmp_path / "set")
    data = ImageTextShards(folder, batch_size=2, rows=RowSpec(max_length=128, packing=True), spec=spec)
    data.setup("fit")
    samples = data._training_set()
    lengths = [samples.length(unit) for unit in range(len(samples))]
    assert lengths == [len(samples[unit].input_ids) for unit in range(len(samples))]
    batch = next(iter(data.train_dataloader()))
    standing = len(batch["tiles"].unique()) - 1 if looks else len(batch["image_keys"])
    assert int((batch["input_ids"] == spec.image_token_id).sum()) == spec.tokens_per_image * standing
    assert len(batch["pixel_values"]) == len(batch["image_keys"]) > len(batch["keys"])
    other = ImageTextShards(folder, batch_size=2, rows=RowSpec(max_length=128, packing=True))
    other.spec = tiled(tiny_world, base, 6 if looks else 2).sample_spec()
    other.setup("fit")
    assert len(list(Path(folder).glob("lengths-*.npy"))) == 2


def test_tiles_are_encoded_each_once_as_pictures_are(tiny_world: TinyWorld, base: str) -> None:
    model = built(tiny_world, base)
    assert model.generate(photo(SIZES[3]), QUESTION) == model.generate(photo(SIZES[3]), QUESTION)
    assert len(model.features.features) == 7
    merged = model.generate([photo(SIZES[3]), photo(SIZES[0])], QUESTION, reduce="aim_merge:1")
    assert isinstance(merged, str)


def stage(world: TinyWorld, base: str, run: Path, data: str, looks: int, thumbnail: bool) -> Path:
    path = write_stage(world, run, "align", steps=6, every=3, val=data)
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    arguments = config["model"]["init_args"]
    arguments["encoder"]["features"] = {"tiles": 6}
    arguments["language"]["base"] = base
    arguments["projector"].update(cross_attention=looks, thumbnail=thumbnail)
    config["data"]["init_args"].update(train=data, batch_size=2, rows={"packing": True, "max_length": 128})
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("looks", "thumbnail"), [(0, False), (2, False), (2, True)], ids=["D", "X", "H"])
def test_a_tiled_stage_goes_on_as_if_not_stopped_and_answers_alike_everywhere(
    tiny_world: TinyWorld, base: str, tmp_path: Path, looks: int, thumbnail: bool
) -> None:
    data = write_many_shapes(tmp_path / "set")
    whole = stage(tiny_world, base, tmp_path / "whole", data, looks, thumbnail)
    cli.run(["fit", "--config", str(whole)])
    kept = tmp_path / "whole" / CHECKPOINT_FOLDER / "previous.ckpt"
    assert torch.load(kept, weights_only=True)["global_step"] == 3
    again = stage(tiny_world, base, tmp_path / "again", data, looks, thumbnail)
    cli.run(["fit", "--config", str(again), "--ckpt_path", str(kept)])
    deltas = [load_file(tmp_path / run / "delta.safetensors") for run in ("whole", "again")]
    assert deltas[0].keys() == deltas[1].keys()
    assert all(torch.equal(tensor, deltas[1][name]) for name, tensor in deltas[0].items())

    model = MoExtend.load(tmp_path / "whole")
    shards = ImageTextShards(test={"all": data}, batch_size=4, spec=model.sample_spec())
    shards.setup("test")
    batch = next(iter(shards.test_dataloader()[0]))
    asked = [[photo(SIZES[(n + m) % 5], n + m) for m in range(1 + (n % 3 == 0))] for n in range(4)]
    answers = model.answer(batch)
    assert answers == model.generate(asked, [QUESTION] * 4)
    exported_alike(model, tmp_path / "exported", asked, answers)
    if thumbnail:
        assert served(tmp_path / "whole", asked[3]) == answers[3]
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        ours = model.language(batch, model.embed(batch))
        names = ("input_ids", "attention_mask", "pixel_values", *(["tiles"] if looks else []))
        torch.testing.assert_close(theirs(**{name: batch[name] for name in names}).logits, ours, atol=1e-6, rtol=0)


def served(run: Path, pictures: list[Image.Image]) -> str:
    server = pytest.importorskip("moextend_pl.export.serving.server")
    client = pytest.importorskip("starlette.testclient")
    files = [base64.b64encode(as_file(picture)).decode() for picture in pictures]
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{file}"}} for file in files
    ]
    asked = {"model": "run", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]}
    with client.TestClient(server.build("run", *server.read(run, None, "", "cpu"), 2**20)) as there:
        told = there.post("/v1/chat/completions", json=asked).json()
    return str(told["choices"][0]["message"]["content"]).strip()


def exported_alike(model: MoExtend, folder: Path, asked: list[list[Image.Image]], answers: list[str]) -> None:
    write_model(model, folder)
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    for pictures, answer in zip(asked, answers, strict=True):
        parts = [*({"type": "image", "image": each} for each in pictures), {"type": "text", "text": QUESTION}]
        chat = [{"role": "user", "content": parts}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(chat, **options)
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        written = processor(images=pictures, text=text, return_tensors="pt")
        assert torch.equal(written["input_ids"], inputs["input_ids"])
        assert torch.equal(written["pixel_values"], inputs["pixel_values"])
        assert "tiles" not in inputs or torch.equal(written["tiles"], inputs["tiles"])
        made = theirs.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(made, skip_special_tokens=True).strip() == answer
