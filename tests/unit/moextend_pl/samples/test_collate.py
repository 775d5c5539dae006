from __future__ import annotations

from dataclasses import replace

import torch

from moextend_pl.contracts import IGNORE_INDEX, Sample
from moextend_pl.samples.collate import collate_generation, collate_packed, collate_training


def sample(key, ids, images, answer=""):
    ids = torch.tensor(ids)
    pixels = torch.full((images, 3, 2, 2), float(len(ids)))
    return Sample(key, ids, ids + 100, pixels, [f"{key}{i}" for i in range(images)], f"{key}?", answer)


SAMPLES = [sample("a", [1, 2, 3], 1, "x"), sample("b", [4], 0, "y"), sample("c", [5, 6], 2, "z")]
X = IGNORE_INDEX


def test_training_batches_are_padded_on_the_right():
    batch = collate_training(SAMPLES, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9], [5, 6, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"].tolist() == [[101, 102, 103], [104, X, X], [105, 106, X]]
    assert batch["keys"] == ["a", "b", "c"]
    assert "prompts" not in batch


def test_generation_batches_are_padded_on_the_left_and_carry_prompts_and_answers():
    batch = collate_generation(SAMPLES, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4], [9, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [[101, 102, 103], [X, X, 104], [X, 105, 106]]
    assert (batch["prompts"], batch["answers"]) == (["a?", "b?", "c?"], ["x", "y", "z"])


def test_images_follow_each_other_in_the_order_of_their_samples():
    batch = collate_training(SAMPLES, pad_id=9)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3.0, 2.0, 2.0]
    assert batch["image_keys"] == ["a0", "c0", "c1"]
    assert collate_training(SAMPLES[1:2], pad_id=9)["pixel_values"].shape == (0, 3, 2, 2)


def test_the_types_are_those_of_the_contract():
    batch = collate_training(SAMPLES, pad_id=9)
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}
    assert batch["pixel_values"].dtype == torch.float32


def test_packed_rows_number_their_samples_over_the_whole_batch():
    batch = collate_packed([SAMPLES[:2], SAMPLES[2:]], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch["documents"].tolist() == [[1, 1, 1, 2], [3, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["keys"] == ["a", "b", "c"]
    assert batch["image_keys"] == ["a0", "c0", "c1"]
    assert SAMPLES[0].labels.tolist() == [101, 102, 103], "the sample itself is left alone"


def test_the_first_token_of_a_document_is_never_a_label():
    assert collate_packed([SAMPLES[:2], SAMPLES[2:]], pad_id=9)["labels"].tolist() == [[X, 102, 103, X], [X, 106, X, X]]


def test_batches_carry_the_task_of_each_sample():
    tasks = [replace(one, task=task) for one, task in zip(SAMPLES, ("vqa", "", "text"), strict=True)]
    for batch in (collate_training(tasks, 9), collate_generation(tasks, 9), collate_packed([tasks], 9)):
        assert batch["tasks"] == ["vqa", "", "text"]
