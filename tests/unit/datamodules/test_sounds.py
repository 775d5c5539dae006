"""Shards with sounds: from files to batches, beside pictures and in any order; damaged ones are bad samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.sounds import RATE, TOKENS, both_entry, sound_entry, sound_file, tiny_whisper, tone, wave
from helpers.tiny_world import TinyWorld, image_entry, picture, text_entry
from transformers import WhisperFeatureExtractor

from datamodules.audit import AuditOptions, audit
from datamodules.dataset import ConversationDataset, UnitTable
from datamodules.pipeline_samples import PipelineSamples
from datamodules.questions import write_questions
from datamodules.reader import ShardReader
from datamodules.shards import Entry, conversation, write_shards
from datamodules.show import describe_labels, describe_sample
from moextend_pl.contracts import SampleSpec, UserError
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.templates import load_tokenizer

PLACES = 2
TALK = conversation(("<sound>\n<image>\nwhat is the color ?", "red"), ("is it <sound> red ?", "yes"), ("a ?", "no"))


@pytest.fixture
def spec(tiny_world: TinyWorld, tmp_path: Path) -> SampleSpec:
    tokenizer, folder = load_tokenizer(str(tiny_world.base)), tiny_whisper(tmp_path / "whisper")
    hears = {"sounds": str(folder), "sound_seconds": 1.0, "tokens_per_sound": TOKENS}
    return SampleSpec(tokenizer, len(tokenizer), PLACES, 32, **hears)


def write(folder: Path, entries: list[Entry]) -> Path:
    folder.mkdir()
    write_shards(entries, folder, 10)
    return folder


def dataset(folder: Path, spec: SampleSpec, turns: str = "together", packed: bool = False) -> ConversationDataset:
    return ConversationDataset(UnitTable([folder], turns), ConversationEncoder(spec), packed=packed)


def test_shards_keep_sounds_beside_pictures_in_their_order(tmp_path: Path) -> None:
    flac = sound_file(wave(1), kind="FLAC")
    folder = write(tmp_path / "set", [Entry("a", TALK, (picture(0),), (tone(0), flac)), sound_entry(1)])
    reader = ShardReader(folder)
    assert reader.read(0).sounds == (tone(0), flac)
    assert reader.read(0).images == (picture(0),)
    assert reader.read(1).sounds == (tone(1),)
    assert [shard.images for shard in reader.shards] == [1]
    with pytest.raises(UserError, match=r"1 `<sound>` in the text for 0 sound\(s\)"):
        ShardReader(write(tmp_path / "mute", [Entry("a", sound_entry(0).conversations)])).read(0)


def test_single_turns_take_their_own_sounds(tmp_path: Path, spec: SampleSpec) -> None:
    folder = write(tmp_path / "set", [Entry("a", TALK, (picture(0),), (tone(0), tone(1)))])
    singles = dataset(folder, spec, "single")
    assert [singles.read(unit).sounds for unit in range(3)] == [(tone(0),), (tone(1),), (tone(0), tone(1))]
    assert singles.read(2).turns[0].human == "<image>\n<sound>\n<sound>\na ?"


def test_a_batch_holds_what_the_extractor_makes_of_each_sound(tmp_path: Path, spec: SampleSpec) -> None:
    entries = [text_entry(0), both_entry(1), sound_entry(2), image_entry(3)]
    samples = dataset(write(tmp_path / "set", entries), spec)
    batch = samples.collate([samples[unit] for unit in range(4)]).batch
    extractor = WhisperFeatureExtractor.from_pretrained(spec.sounds)
    mels = extractor([wave(1), wave(2)], sampling_rate=RATE, return_tensors="pt").input_features
    torch.testing.assert_close(batch["sounds"], mels, atol=2e-2, rtol=0)  # files have 16 bits
    heard = (batch["input_ids"] == spec.image_token_id + 1).sum(dim=1).tolist()
    assert heard == [0, TOKENS, TOKENS, 0]
    both = batch["input_ids"][1].tolist()
    assert both.index(spec.image_token_id + 1) < both.index(spec.image_token_id)
    assert not (batch["labels"] >= spec.image_token_id).any()
    assert len(set(batch["sound_keys"])) == 2
    assert samples.length(1) == len(samples[1].input_ids)


def test_packed_rows_keep_the_order_of_sounds(tmp_path: Path, spec: SampleSpec) -> None:
    samples = dataset(write(tmp_path / "set", [sound_entry(0), text_entry(0), both_entry(1)]), spec, packed=True)
    batch = samples.collate([[samples[2], samples[1]], [samples[0]]]).batch
    assert torch.equal(batch["sounds"][0], samples[2].sounds[0])
    assert torch.equal(batch["sounds"][1], samples[0].sounds[0])


def test_truncation_never_cuts_a_sound(tmp_path: Path, spec: SampleSpec) -> None:
    folder = write(tmp_path / "set", [Entry("a", TALK, (picture(0),), (tone(0), tone(1)))])
    samples = ConversationDataset(UnitTable([folder]), ConversationEncoder(spec, max_length=18))
    sample = samples[0]
    assert len(sample.sounds) == 1
    assert int((sample.input_ids == spec.image_token_id + 1).sum()) == TOKENS


def test_damaged_and_long_sounds_are_bad_samples(tmp_path: Path, spec: SampleSpec) -> None:
    turns = sound_entry(0).conversations
    broken = [Entry("a", turns, sounds=(tone(0)[:30],)), Entry("b", turns, sounds=(sound_file(wave(0, 1.5)),))]
    samples = dataset(write(tmp_path / "set", [*broken, sound_entry(2)]), spec)
    delivery = samples.collate([samples[unit] for unit in range(3)])
    assert [bad.key for bad in delivery.bad] == ["a", "b"]
    assert "expected a sound as WAV" in delivery.bad[0].reason
    assert "at most 1 seconds" in delivery.bad[1].reason
    assert len(delivery.batch["sounds"]) == 1


def test_pipelines_of_others_bring_sounds_as_files(spec: SampleSpec) -> None:
    turns = both_entry(1).conversations
    made = [{"conversations": turns, "png": picture(1), "wav": tone(1)}, {"conversations": turns, "png": picture(1)}]
    stream = iter(PipelineSamples(lambda: [*made, {**made[0], "wav": wave(1)}], ConversationEncoder(spec)))
    good, mute, decoded = (next(stream) for _ in range(3))
    assert len(good.sounds) == len(good.pixel_values) == 1
    assert "1 `<sound>` in the text for 0 sound(s)" in mute.bad.reason
    assert "expected sounds as bytes of files, got ndarray" in decoded.bad.reason


def test_sets_with_sounds_are_audited_and_shown(tiny_world: TinyWorld, tmp_path: Path) -> None:
    entries = [both_entry(0), Entry("z", sound_entry(0).conversations, sounds=(tone(0)[:30],))]
    folder = write(tmp_path / "set", entries)
    report = audit(folder, AuditOptions(tokenizer=str(tiny_world.base))).to_dict()
    assert report["formats"] == {"PNG": 1, "WAV": 1}
    assert [problem.partition(" expected")[0] for problem in report["problems"]] == ["00000.tar: z:"]
    raw = ShardReader(folder).read(0)
    assert f"sound 0: WAV, {len(tone(0))} bytes" in describe_sample(raw)
    assert "<sound>*4 <image>*4" in describe_labels(raw, tiny_world.base, 4, None, colour=False)[1]


def test_a_test_set_of_questions_leaves_samples_with_sounds_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [sound_entry(0), image_entry(0)])
    assert write_questions(folder, tmp_path / "out", 10) == (
        1, Counter({"samples with sounds": 1, "later questions of conversations": 1})
    )  # fmt: skip
