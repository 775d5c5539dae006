from __future__ import annotations

import itertools

import pytest

from datamodules.batching import EndlessBatches, PlainBatches
from datamodules.order import FILLER, EveryUnitOnce, Order, shuffled
from moextend_pl.contracts import UserError

SIZES = [5, 3, 0, 7, 4, 2, 6]
UNITS = sum(SIZES)


def batches(rank=0, world=1, consumed=0, count=20, seed=3, size=8):
    sampler = EndlessBatches(PlainBatches(Order(SIZES, seed, block=2), size), rank, world, lambda: consumed)
    return list(itertools.islice(sampler, count))


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    order = Order(SIZES, seed=3, block=2)
    epochs = [order.epoch(epoch).tolist() for epoch in range(6)]
    assert all(sorted(epoch) == list(range(UNITS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_the_order_depends_on_seed_and_epoch_alone():
    assert Order(SIZES, 3).epoch(5).tolist() == Order(SIZES, 3).epoch(5).tolist()
    assert Order(SIZES, 3).epoch(5).tolist() != Order(SIZES, 4).epoch(5).tolist()
    assert Order(SIZES, 3).epoch(4).tolist() != Order(SIZES, 4).epoch(3).tolist()


def splitmix64(value: int) -> int:
    """In plain Python, after https://prng.di.unimi.it/splitmix64.c."""
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_order_is_fixed_by_plain_arithmetic_so_that_no_version_of_a_library_changes_it():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first number of seed 0
    for seeds in ((1, 2), (0,), (-5, 3, 7)):
        state = 0
        for seed in seeds:
            state = splitmix64(state ^ (seed % 2**64))
        expected = sorted(range(50), key=lambda i, state=state: splitmix64(splitmix64(i ^ state)))
        assert shuffled(50, *seeds).tolist() == expected


def test_shuffles_are_even_over_seeds():
    counts = [[0] * 6 for _ in range(6)]
    for seed in range(3000):
        for place, number in enumerate(shuffled(6, seed).tolist()):
            counts[place][number] += 1
    assert all(420 < count < 580 for row in counts for count in row)  # 500 expected, sigma 20


def test_units_of_a_block_stay_together():
    order = Order(SIZES, seed=3, block=2)
    shard_of = [shard for shard, size in enumerate(SIZES) for _ in range(size)]
    seen = [shard_of[unit] for unit in order.epoch(0)]
    shards = list(dict.fromkeys(shuffled(len(SIZES), 3, 0).tolist()))
    start = 0
    for first in range(0, len(shards), 2):
        block = shards[first : first + 2]
        length = sum(SIZES[shard] for shard in block)
        assert set(seen[start : start + length]) <= set(block)
        start += length
    big = Order([50, 50], seed=0, block=2).epoch(0).tolist()
    assert len({unit // 50 for unit in big[:20]}) == 2  # shards of one block are mixed


def test_blocks_of_equal_size_are_shuffled_differently():
    order = Order([20] * 4, seed=0, block=1).epoch(0).reshape(4, 20) % 20
    assert len({tuple(block) for block in order.tolist()}) == 4


def test_batches_are_consecutive_positions_of_endless_epochs():
    order = Order(SIZES, 3, block=2)
    stream = [unit for epoch in range(8) for unit in order.epoch(epoch).tolist()]
    assert batches(count=25) == [stream[8 * g : 8 * g + 8] for g in range(25)]
    huge = batches(count=2, size=3 * UNITS)
    assert huge == [stream[: 3 * UNITS], stream[3 * UNITS : 6 * UNITS]]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_slices_of_all_ranks_make_up_the_global_batch(world):
    ranks = [batches(rank, world) for rank in range(world)]
    joined = [[unit for part in parts for unit in part] for parts in zip(*ranks, strict=True)]
    assert joined == batches()
    assert all(len(batch) == 8 // world for rank in ranks for batch in rank)


@pytest.mark.parametrize("consumed", [8, 40, 27, 11])
def test_a_run_goes_on_at_any_number_of_consumed_samples(consumed):
    flat = [unit for batch in batches(count=30) for unit in batch]
    assert [unit for batch in batches(consumed=consumed, count=5) for unit in batch] == flat[consumed : consumed + 40]


def test_every_iteration_asks_anew_what_was_consumed():
    place = [0]
    sampler = EndlessBatches(PlainBatches(Order(SIZES, 3), 8), 0, 1, lambda: place[0])
    first = list(itertools.islice(sampler, 5))
    place[0] = 16
    assert list(itertools.islice(sampler, 3)) == first[2:5]


def test_the_endless_sampler_has_no_length():
    with pytest.raises(TypeError):
        len(EndlessBatches(PlainBatches(Order(SIZES, 3), 8), 0, 1))


@pytest.mark.parametrize(("size", "world", "advice"), [(10, 4, "8 or 12"), (3, 4, "Use 4"), (0, 2, "Use 2")])
def test_a_batch_that_cannot_be_shared_names_the_nearest_numbers(size, world, advice):
    with pytest.raises(UserError, match=advice):
        EndlessBatches(PlainBatches(Order(SIZES, 3), size), 0, world)
    with pytest.raises(UserError, match=advice):
        EveryUnitOnce(range(5), size, 0, world)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 4, 7, 8, 9, 16])
def test_evaluation_sees_each_unit_once_with_as_many_batches_on_each_rank(count, world):
    ranks = [list(EveryUnitOnce(range(count), 4, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(EveryUnitOnce(range(count), 4, 0, world)) == len(ranks[0])
    seen = [unit for rank in ranks for batch in rank for unit in batch if unit != FILLER]
    assert sorted(seen) == list(range(count))
    assert all(batch and len(batch) <= 4 // world for rank in ranks for batch in rank)
    if world == 1:
        assert FILLER not in [unit for batch in ranks[0] for unit in batch]
