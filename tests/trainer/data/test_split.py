"""Orders and held-out documents are pure functions of names and seed."""

import numpy as np

from trainer.data.split import arrange, digest, divide, is_held_out, mix

HASHES = np.array([digest(f"document {i}") for i in range(2000)], np.uint64)


def test_the_mix_is_that_of_splitmix64():
    # First three outputs of SplitMix64 from state 0: the published reference values.
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(x) for x in mix(states)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_orders_are_permutations_that_differ_by_seed_and_epoch():
    orders = [arrange(HASHES, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(2000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert arrange(HASHES, 1, 1).tolist() == orders[3].tolist()


def test_an_order_stays_what_it_was_on_the_day_it_was_written():
    assert arrange(HASHES[:8], 0, 0).tolist() == [5, 6, 1, 4, 3, 7, 0, 2]


def test_a_document_stays_held_out_when_others_come():
    few, many = is_held_out(HASHES[:500], 0.1), is_held_out(HASHES, 0.1)
    assert (few == many[:500]).all()
    assert 150 < many.sum() < 250


def test_train_and_held_out_share_no_document_and_leave_none():
    train, held_out = divide(HASHES, 0.1)
    assert sorted([*train, *held_out]) == list(range(2000))


def test_neither_side_is_empty_where_there_are_two_documents():
    for fraction in (1e-9, 0.999999):
        train, held_out = divide(HASHES[:2], fraction)
        assert len(train) == len(held_out) == 1
    for fraction in (1e-9, 0.5, 0.999999):
        assert [len(side) for side in divide(HASHES[:1], fraction)] == [1, 0]
    assert [len(side) for side in divide(HASHES, 0.0)] == [2000, 0]
