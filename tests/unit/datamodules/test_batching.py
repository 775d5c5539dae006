from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.batching import (
    BucketBatches,
    EndlessBatches,
    PackedBatches,
    PlainBatches,
    check_options,
    first_fit,
)
from datamodules.options import EvaluationSpec, ReadingSpec, RowSpec
from datamodules.order import FILLER, Order
from moextend_pl.contracts import UserError

SIZES = [5, 3, 7, 4, 2, 6]
UNITS = sum(SIZES)
ORDER = Order(SIZES, seed=3, block=2)
LENGTHS = np.random.default_rng(0).integers(1, 40, UNITS)


def packed(rows=4, tokens=50):
    return PackedBatches(ORDER, LENGTHS, rows, tokens)


def units_of(rows):
    return [unit for row in rows for unit in (row if isinstance(row, tuple) else (row,)) if unit != FILLER]


def walk(plan, batches, start=0):
    found = []
    for _ in range(batches):
        rows, start = plan.batch(start)
        found.append(rows)
    return found, start


@pytest.mark.parametrize("plan", [PlainBatches(ORDER, 4), packed(), packed(rows=1)], ids=["plain", "packed", "one row"])
def test_batches_take_the_units_of_the_order_without_gap_or_repetition(plan):
    batches, end = walk(plan, 30)
    position = 0
    for rows in batches:
        units = units_of(rows)
        assert sorted(units) == sorted(ORDER.units(position, len(units)).tolist())
        position += len(units)
    assert position == end == plan.after(0, 30)


def test_buckets_take_the_units_of_each_window():
    plan = BucketBatches(ORDER, LENGTHS, 4, window=5)
    batches, end = walk(plan, 25)
    assert end == plan.after(0, 25) == 100
    for window in range(5):
        units = units_of([row for rows in batches[5 * window : 5 * window + 5] for row in rows])
        assert sorted(units) == sorted(ORDER.units(20 * window, 20).tolist())


def test_buckets_pad_less_and_their_batches_come_in_any_order():
    order, lengths = Order([500], 1), np.random.default_rng(1).integers(1, 200, 500)

    def padding(plan):
        batches = [lengths[rows] for rows in walk(plan, 50)[0]]
        return sum(len(own) * own.max() - own.sum() for own in batches) / sum(own.sum() for own in batches)

    plain, bucket = PlainBatches(order, 8), BucketBatches(order, lengths, 8, window=16)
    assert padding(bucket) < 0.2 * padding(plain)
    longest = [int(lengths[rows].max()) for rows in walk(bucket, 16)[0]]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_a_batch_depends_on_its_start_alone():
    for make in (packed, lambda: BucketBatches(ORDER, LENGTHS, 4, 3), lambda: PlainBatches(ORDER, 4)):
        whole, _ = walk(make(), 20)
        for place in (1, 7, 13):
            plan = make()
            assert walk(plan, 20 - place, plan.after(0, place))[0] == whole[place:]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_rows_of_packed_batches(world):
    alone, _ = walk(packed(), 12)
    ranks = [iter(EndlessBatches(packed(), rank, world)) for rank in range(world)]
    for rows in alone:
        assert [row for rank in ranks for row in next(rank)] == rows


def test_packed_rows_are_never_too_long_and_nearly_full():
    order = Order([2000], 0)
    lengths = np.random.default_rng(2).integers(5, 400, 2000)
    batches, _ = walk(PackedBatches(order, lengths, 16, 1024), 20)
    rows = [sum(lengths[list(row)]) for batch in batches for row in batch]
    assert max(rows) <= 1024
    assert np.mean(rows) > 0.97 * 1024


def test_rows_are_shuffled_so_that_no_rank_gets_the_long_units():
    order = Order([2000], 0)
    lengths = np.random.default_rng(2).integers(5, 400, 2000)
    longest = np.array(
        [[max(lengths[list(row)]) for row in batch] for batch in walk(PackedBatches(order, lengths, 8, 1024), 40)[0]]
    )
    halves = longest.reshape(40, 2, 4).mean(axis=(0, 2))
    assert abs(halves[0] - halves[1]) < 0.15 * halves.mean()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=25), st.integers(1, 6))
def test_first_fit_never_overfills_a_row_and_always_fits_half_the_room(lengths, rows):
    lengths = np.array(lengths)
    found = first_fit(lengths, rows, 30)
    if found is not None:
        assert all(lengths[found == row].sum() <= 30 for row in range(rows))
    assert found is not None or lengths.sum() > rows * 30 / 2


def test_first_fit_is_the_textbooks():
    assert first_fit(np.array([4, 8, 1, 4, 2, 1]), 2, 10).tolist() == [1, 0, 1, 1, 0, 1]
    assert first_fit(np.array([6, 6, 6]), 2, 10) is None


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([RowSpec(packing=True)], "max_length"),
        ([RowSpec(bucket=0)], "at least 1"),
        ([RowSpec(packing=True, bucket=4, max_length=5)], "packing: true"),
        ([RowSpec(max_length=0)], "`rows.max_length` of the data module of at least 1, got 0"),
        ([RowSpec(), ReadingSpec(-1)], "`reading.num_workers` of the data module of at least 0, got -1"),
        (
            [RowSpec(), ReadingSpec(), EvaluationSpec(samples=-5)],
            "`evaluation.samples` of the data module of at least 1, got -5",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options, word):
    with pytest.raises(UserError, match=word):
        check_options(*options, *(ReadingSpec(), EvaluationSpec())[len(options) - 1 :])
