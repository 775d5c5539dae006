"""What a step must know of a batch, found on the host."""

from __future__ import annotations

import pytest
from helpers.tiny_world import TinyWorld

from moextend_pl.contracts import IGNORE_INDEX
from moextend_pl.samples.host_facts import tokens_in, with_host_facts


@pytest.mark.parametrize("kinds", ["iti", "tt"])
def test_facts_are_those_of_a_plain_loop_over_the_batch(tiny_world: TinyWorld, kinds: str) -> None:
    model = tiny_world.unbuilt()
    batch = tiny_world.batch(model, kinds)
    known = model.with_host_facts(batch)["known"]
    rows = batch["labels"].tolist()
    assert known.targets.tolist() == [label for row in rows for label in row[1:] if label != IGNORE_INDEX]
    shifted = [label for row in rows for label in (*row[1:], IGNORE_INDEX)]
    assert known.learned.tolist() == [place for place, label in enumerate(shifted) if label != IGNORE_INDEX]
    ids = [token for row in batch["input_ids"].tolist() for token in row]
    assert known.images.tolist() == [place for place, token in enumerate(ids) if token == model.language.image_token_id]
    assert known.tokens == tokens_in(batch) == sum(sum(row) for row in batch["attention_mask"].tolist())


def test_a_batch_that_has_its_facts_keeps_them(tiny_world: TinyWorld) -> None:
    batch = with_host_facts(tiny_world.batch(tiny_world.unbuilt(), "it"), 7)
    assert with_host_facts(batch, 7) is batch
