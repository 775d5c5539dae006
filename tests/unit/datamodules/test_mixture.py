from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.mixture import Mixture, ShardSet, largest_remainder, shard_sets, training_order
from datamodules.order import Order
from moextend_pl.contracts import UserError

BIG, SMALL = [30, 30, 20], [7, 3]


def owners(units):
    return ["small" if unit >= sum(BIG) else "big" for unit in units]


def test_an_epoch_takes_from_each_set_its_share():
    mixture = Mixture([BIG, SMALL], [1, 2], seed=0)
    assert len(mixture) == 90
    for epoch in range(3):
        assert Counter(owners(mixture.epoch(epoch).tolist())) == {"big": 30, "small": 60}


def test_each_set_goes_on_where_it_stopped_and_begins_again_with_a_new_shuffle():
    mixture = Mixture([BIG, SMALL], [1, 2], seed=0)
    units = mixture.units(0, 8 * 90).tolist()
    big = [unit for unit in units if unit < 80]
    small = [unit - 80 for unit in units if unit >= 80]
    for own, size in ((big, 80), (small, 10)):
        rounds = [own[first : first + size] for first in range(0, len(own), size)]
        assert all(sorted(one) == list(range(size)) for one in rounds)
        assert len({tuple(one) for one in rounds}) == len(rounds)


def test_sets_are_interleaved_differently_in_each_epoch_and_by_seed():
    patterns = [tuple(owners(Mixture([BIG, SMALL], [1, 1], seed).epoch(e).tolist())) for seed in (0, 1) for e in (0, 1)]
    assert len(set(patterns)) == 4
    runs = sum(a != b for a, b in zip(patterns[0], patterns[0][1:], strict=False))
    assert runs > 30  # 45 expected of 89 borders: the sets do not follow each other in blocks


def test_sets_of_equal_sizes_are_shuffled_differently():
    units = Mixture([[40], [40]], [1, 1], seed=0).epoch(0).tolist()
    assert [u for u in units if u < 40] != [u - 40 for u in units if u >= 40]


def test_a_mixture_is_a_function_of_seed_and_epoch():
    assert Mixture([BIG, SMALL], [1, 2], 5).epoch(4).tolist() == Mixture([BIG, SMALL], [1, 2], 5).epoch(4).tolist()


def test_sets_without_weights_are_one_set():
    sets = (ShardSet("a"), ShardSet("b", task="t"))
    assert training_order(sets, [BIG, SMALL], 3).epoch(1).tolist() == Order(BIG + SMALL, 3).epoch(1).tolist()


@given(st.integers(0, 1000), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_shares_add_up_and_are_off_by_less_than_one(total, weights):
    shares = largest_remainder(total, weights)
    assert sum(shares) == total
    assert all(abs(share - Fraction(total * w, sum(weights))) < 1 for share, w in zip(shares, weights, strict=True))


def test_what_rounding_leaves_goes_to_the_largest_fraction():
    assert largest_remainder(10, [1, 1, 1]) == [4, 3, 3]
    assert largest_remainder(7, [6, 1]) == [6, 1]
    assert largest_remainder(10, [0.33, 0.67]) == [3, 7]


def test_names_become_sets():
    assert shard_sets("a") == (ShardSet("a"),)
    assert shard_sets(["a", ShardSet("b", 2.0)][:1]) == (ShardSet("a"),)
    assert shard_sets(ShardSet("b", 2.0)) == (ShardSet("b", 2.0),)
    assert shard_sets(None) == ()


@pytest.mark.parametrize("weights", [(1.0, None), (1.0, 0.0), (1.0, -1.0), (1.0, float("inf"))])
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(UserError, match="`weight`"):
        shard_sets([ShardSet("a", weights[0]), ShardSet("b", weights[1])])


def test_a_set_that_would_never_be_seen_is_refused():
    with pytest.raises(UserError, match="at least one sample"):
        Mixture([BIG, SMALL], [1000, 1], seed=0)
