from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from datamodules.dataset import ConversationDataset, UnitTable
from datamodules.lengths import unit_lengths
from moextend_pl.contracts import UserError
from moextend_pl.samples.conversation import ConversationEncoder


def dataset(folder, spec):
    return ConversationDataset(UnitTable([folder]), ConversationEncoder(spec))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_while_tokens_are_counted_is_told_in_one_sentence(folder, spec, workers):
    samples = dataset(folder, spec)
    with (folder / "00001.tar").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match=r"00001.tar: the index says") as caught:
        unit_lengths(samples, None, workers)
    assert "Traceback" not in str(caught.value)


def test_a_damaged_file_of_lengths_is_counted_again(folder, spec):
    lengths = unit_lengths(dataset(folder, spec), None, 0)
    path = next(folder.glob("lengths-*.npy"))
    whole = path.read_bytes()
    for wrong in (lengths[:-1], lengths * 1.0, lengths * 0):
        np.save(path, wrong)
        assert unit_lengths(dataset(folder, spec), None, 0).tolist() == lengths.tolist()
    for damage in (b"", whole[:-5], whole[:60], b"PK\3\4" + whole):
        path.write_bytes(damage)
        assert unit_lengths(dataset(folder, spec), None, 0).tolist() == lengths.tolist()
    assert path.read_bytes() == whole


def test_lengths_are_counted_again_where_the_template_writes_another_end(folder, spec):
    before = unit_lengths(dataset(folder, spec), None, 0)
    tokenizer = copy.deepcopy(spec.tokenizer)
    tokenizer.eos_token = " a blue circle"  # as another `eos_token` in tokenizer_config.json
    assert tokenizer.backend_tokenizer.to_str() == spec.tokenizer.backend_tokenizer.to_str()
    other = dataset(folder, replace(spec, tokenizer=tokenizer))
    after = unit_lengths(other, None, 0)
    assert after.tolist() == [other.length(unit) for unit in range(len(other))] != before.tolist()
