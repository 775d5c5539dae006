"""A model that saw learns to hear, and sees and reads as before, bit for bit."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from helpers.sounds import RATE, TOKENS, both_entry, hearing_batch, hearing_model, sound_entry, tiny_whisper, tone
from helpers.tiny_world import EXPERTS, TinyWorld, image_entry, make_plan, perturb, text_entry
from torch import Tensor
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperFeatureExtractor,
    WhisperModel,
)

from callbacks.expert_extension import ExpertExtension
from datamodules.shards import Entry
from moextend_pl.contracts import Batch, SampleSpec, TrainPlan, UserError
from moextend_pl.export.folder import export_run, exported
from moextend_pl.export.share import share
from moextend_pl.inference.decoding import row_seeds
from moextend_pl.models.delta import save_delta
from moextend_pl.models.modalities.hearing import Hearing
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.manifest import read_manifest
from moextend_pl.samples.sound.features import SoundTransform

NEW = ("new_experts", "new_routers", "calibration")
SEES, HEARS = make_plan((0, 2)), make_plan((1, 2), (0,), routing="masked_sound")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def seeing(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of a model that was extended to see and has learned."""
    model = tiny_world.unbuilt()
    model.extension_plan, model.train_plan = SEES, TrainPlan((*NEW, "projector"))
    model.configure_model()
    perturb([p for name in (*NEW, "projector") for p in model.parts()[name]])
    run = tmp_path_factory.mktemp("seeing")
    save_delta(model, run)
    return run


@pytest.fixture(scope="module")
def before(seeing: Path) -> MoExtend:
    """The model of that run."""
    return MoExtend.load(seeing)


@pytest.fixture(scope="module")
def heard(tiny_world: TinyWorld, whisper: Path, seeing: Path) -> MoExtend:
    """The same, extended to hear, after hearing has learned."""
    parts = (*NEW, "hearing")
    model = hearing_model(tiny_world, whisper, seeing, HEARS, parts)
    perturb([p for name in parts for p in model.parts()[name]], seed=7)
    return model


@torch.no_grad()
def logits(model: MoExtend, batch: Batch) -> Tensor:
    return model.language(batch, model.embed(batch))


SEEN = [[text_entry(1), text_entry(2)], [image_entry(0), image_entry(3)], [image_entry(1), text_entry(1)]]


@pytest.mark.parametrize("entries", SEEN, ids=["text", "pictures", "both"])
def test_what_a_model_saw_and_read_it_sees_and_reads_bit_for_bit_after_it_learned_to_hear(
    heard: MoExtend, before: MoExtend, entries: list[Entry]
) -> None:
    assert torch.equal(logits(heard, hearing_batch(heard, entries)), logits(before, hearing_batch(before, entries)))


def test_answers_about_pictures_and_texts_stay_in_cached_decoding(heard: MoExtend, before: MoExtend) -> None:
    entries = [image_entry(0), text_entry(2), image_entry(3)]
    answers = [model.answer(hearing_batch(model, entries, generation=True)) for model in (before, heard)]
    assert answers[0] == answers[1]
    with_sound = [*entries, sound_entry(1)]  # beside one that hears, too
    assert heard.answer(hearing_batch(heard, with_sound, generation=True))[:3] == answers[0]


def test_only_sequences_with_a_sound_reach_the_experts_of_hearing(heard: MoExtend) -> None:
    entries = [sound_entry(0), image_entry(0), both_entry(1), text_entry(0)]
    batch = hearing_batch(heard, entries)
    with heard.language.watch.recording() as records:
        logits(heard, batch)
    reached = {"see": set(), "hear": set()}
    for record in records:
        rows = record.indices.reshape(len(entries), -1)
        first = {0: {"see": EXPERTS}, 1: {"hear": EXPERTS}, 2: {"see": EXPERTS, "hear": EXPERTS + 1}}[record.layer]
        for sense, expert in first.items():
            reached[sense] |= set((rows == expert).any(dim=1).nonzero().flatten().tolist())
    assert reached["see"] <= {1, 2}
    assert reached["see"]
    assert reached["hear"] <= {0, 2}
    assert reached["hear"]


def test_placeholders_are_filled_with_what_transformers_own_encoder_hears(heard: MoExtend, whisper: Path) -> None:
    batch = hearing_batch(heard, [text_entry(0), both_entry(1), sound_entry(2)])
    with torch.no_grad():
        frames = WhisperModel.from_pretrained(whisper).encoder(batch["sounds"]).last_hidden_state
        expected = heard.hearing.connector(frames).flatten(0, 1)
        got = heard.embed(batch)[batch["input_ids"] == heard.language.image_token_id + 1]
    assert len(got) == 2 * TOKENS
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("connector", ["mlp2x_gelu", "qformer"])
def test_a_step_teaches_what_is_planned_and_nothing_else(tiny_world: TinyWorld, whisper: Path, connector: str) -> None:
    model = hearing_model(tiny_world, whisper, None, HEARS, (*NEW, "hearing"), connector=connector)
    model(hearing_batch(model, [sound_entry(0), both_entry(1)])).loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {name for name, p in model.named_parameters() if p.requires_grad}
    new = {id(p) for part in (*NEW, "hearing") for p in model.parts()[part]}
    assert {name for name, p in model.named_parameters() if id(p) in new} == learned
    assert all(p.grad.abs().sum() > 0 for p in model.parts()["hearing"][-2:])


def test_a_batch_without_a_sound_leaves_no_rank_waiting_for_gradients(tiny_world: TinyWorld, whisper: Path) -> None:
    model = hearing_model(tiny_world, whisper, None, HEARS, (*NEW, "hearing", "sound_encoder"))
    for entries in ([text_entry(0)], [sound_entry(0)]):
        model.zero_grad()
        model(hearing_batch(model, entries)).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_run_that_hears_is_loaded_again(heard: MoExtend, tmp_path: Path) -> None:
    save_delta(heard, tmp_path)
    again = MoExtend.load(tmp_path)
    entries = [both_entry(0), sound_entry(1), image_entry(1)]
    assert torch.equal(logits(again, hearing_batch(again, entries)), logits(heard, hearing_batch(heard, entries)))
    manifest = read_manifest(tmp_path)
    assert any(name.startswith("hearing.encoder.") for name in manifest.frozen)
    assert not any(name.startswith("hearing.encoder.") for name in manifest.trained)


def test_an_encoder_that_changed_is_noticed(heard: MoExtend, tiny_world: TinyWorld, tmp_path: Path) -> None:
    folder = tiny_whisper(tmp_path / "whisper")
    model = hearing_model(tiny_world, folder, None, HEARS, ("hearing",))
    save_delta(model, tmp_path / "run")
    tiny_whisper(folder, seed=1)
    with pytest.raises(UserError, match=r"the base has changed .*hearing\.encoder"):
        MoExtend.load(tmp_path / "run")


def test_what_knows_of_no_sounds_refuses_a_run_that_hears(heard: MoExtend, tmp_path: Path) -> None:
    save_delta(heard, tmp_path / "run")
    for use in (export_run, share):
        with pytest.raises(UserError, match="Expected a model that does not hear, got .*run with `hearing`"):
            use(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="got one with `hearing`; no exported folder has it yet"):
        exported(heard)


def test_a_seeded_draw_depends_on_the_sound_and_on_no_other_row(heard: MoExtend) -> None:
    entries = [both_entry(0), image_entry(1), sound_entry(1), text_entry(0)]
    rows = [row_seeds(hearing_batch(heard, [entry], generation=True), 1)[0] for entry in entries]
    assert row_seeds(hearing_batch(heard, entries, generation=True), 1) == rows
    batch = hearing_batch(heard, entries, generation=True)
    batch["sound_keys"][1] = "another"
    assert [a == b for a, b in zip(row_seeds(batch, 1), rows, strict=True)] == [True, True, False, True]


def test_placeholders_without_sounds_are_refused(heard: MoExtend) -> None:
    batch = hearing_batch(heard, [sound_entry(0)])
    del batch["sounds"]
    with pytest.raises(UserError, match="the sounds of 3 placeholders in the batch, got none"):
        heard.embed(batch)
    batch["tiles"] = torch.zeros_like(batch["input_ids"])
    with pytest.raises(UserError, match=r"got `projector.cross_attention`, which was not tried with `hearing`"):
        heard.embed(batch)


def test_a_plan_for_sounds_is_refused_where_nothing_hears(tiny_world: TinyWorld, seeing: Path, tmp_path: Path) -> None:
    HEARS.save(tmp_path / "plan.yaml")
    callback = ExpertExtension(plan=str(tmp_path / "plan.yaml"))
    with pytest.raises(UserError, match="Expected a model with `hearing` for `routing: masked_sound`"):
        callback.setup(None, tiny_world.unbuilt(seeing), "fit")


@pytest.mark.parametrize("kind", ["ast", "wav2vec2"])
def test_other_encoders_hear_as_transformers_runs_them(tmp_path: Path, kind: str) -> None:
    few: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "ast":
        model: Any = ASTModel(ASTConfig(**few, max_length=100, num_mel_bins=32))
        extractor: Any = ASTFeatureExtractor(num_mel_bins=32, max_length=100)
    else:
        sizes: dict[str, Any] = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        model = Wav2Vec2Model(Wav2Vec2Config(**few, **sizes, conv_dim=(8,) * 7))
        extractor = Wav2Vec2FeatureExtractor()
    model.eval().save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    hearing = Hearing(path=str(tmp_path), connector="linear", tokens=5, seconds=None if kind == "ast" else 1.0)
    hearing.build_for(8)
    spec = SampleSpec(None, 0, 0, 0, **hearing.facts())  # type: ignore[arg-type]
    heard = torch.from_numpy(SoundTransform(spec)(tone(0), "x"))[None]
    samples = soundfile.read(io.BytesIO(tone(0)), dtype="float32")[0]
    options = {} if kind == "ast" else {"padding": "max_length", "max_length": RATE}
    expected = extractor(samples, sampling_rate=RATE, return_tensors="pt", **options).input_values
    torch.testing.assert_close(heard, expected)
    with torch.no_grad():
        frames = hearing.eval().encode(heard)
        assert hearing(frames).shape == (1, 5, 8)
        assert torch.equal(frames, model(heard).last_hidden_state)
    assert hearing.frames == frames.shape[1]


def test_folders_that_hold_no_ears_are_refused(tiny_world: TinyWorld, whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"an audio model as `hearing.path`, found no config.json"):
        Hearing(path=str(tmp_path))
    with pytest.raises(UserError, match="an audio model of whisper, .* got 'mixtral'"):
        Hearing(path=str(tiny_world.base))
    shutil.copy(whisper / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"the feature extractor of an audio model in .*preprocessor_config.json"):
        Hearing(path=str(tmp_path))
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not take what its feature extractor makes"):
        hearing_model(tiny_world, tmp_path)


def test_files_with_impossible_numbers_are_refused(tiny_world: TinyWorld, whisper: Path, tmp_path: Path) -> None:
    for name, key, value, sentence in (
        ("config.json", "d_model", 15, "does not take what its feature extractor makes"),
        ("config.json", "encoder_attention_heads", 0, "does not take what its feature extractor makes"),
        ("preprocessor_config.json", "sampling_rate", 0, "the feature extractor of an audio model in"),
    ):
        folder = tmp_path / f"{key}"
        shutil.copytree(whisper, folder)
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**told, key: value}))
        with pytest.raises(UserError, match=sentence):
            hearing_model(tiny_world, folder)
    with pytest.raises(UserError, match=r"`hearing.tokens` of at most 50, the frames of a sound, for connector"):
        hearing_model(tiny_world, whisper, connector="linear", tokens=51)


def test_a_model_that_does_not_hear_says_so(tiny_world: TinyWorld) -> None:
    model = tiny_world.model()
    with pytest.raises(UserError, match="does not hear, got a `<sound>`"):
        hearing_batch(model, [sound_entry(0)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"connector": "conv"}, "`hearing.connector` to be qformer, linear or mlpNx_gelu"),
        ({"tokens": 0}, "`hearing.tokens` of at least 1, got 0"),
        ({"depth": 0}, "`hearing.depth` of at least 1, got 0"),
        ({"seconds": 4.0}, "no `hearing.seconds` for whisper, which always reads 1 seconds, got 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(whisper: Path, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Hearing(path=str(whisper), **options)
