"""Pages are shared by content, copied on write, and all come back."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.cache.page_storage import PageStorage
from models.cache.paged_pool import PagePool, PoolFull

PAGE = 4


def prompt(length, start=0):
    return list(range(start, start + length))


def test_a_table_holds_as_many_pages_as_its_tokens_need():
    pool = PagePool(8, PAGE)
    assert pool.open("a", prompt(9)) == 0
    extension = pool.extend("a", prompt(9))
    assert extension.slots == list(range(9))
    assert extension.copied is None
    assert pool.table("a") == [0, 1, 2]
    assert pool.free_pages() == 5
    assert pool.waste() == pytest.approx(3 / 12)


def test_a_prompt_finds_the_full_pages_that_another_one_filled():
    pool = PagePool(8, PAGE)
    pool.open("a", prompt(10))
    pool.extend("a", prompt(10))
    other = [*prompt(8), 70, 71, 72]
    assert pool.open("b", other) == 8
    pool.extend("b", other[8:])
    assert pool.table("b")[:2] == pool.table("a")[:2]
    assert pool.readers(0) == pool.readers(1) == 2
    assert pool.free_pages() == 8 - 4


def test_the_last_token_of_a_prompt_is_computed_again():
    pool = PagePool(8, PAGE)
    pool.open("a", prompt(8))
    pool.extend("a", prompt(8))
    assert pool.open("b", prompt(8)) == PAGE


def test_equal_tokens_after_different_prefixes_are_different_pages():
    pool = PagePool(8, PAGE)
    pool.open("a", prompt(8))
    pool.extend("a", prompt(8))
    other = [90, 91, 92, 93, *prompt(8)[4:], 5]
    assert pool.open("b", other) == 0
    salted = PagePool(8, PAGE, salt=b"adapter")
    salted.open("a", prompt(8))
    salted.extend("a", prompt(8))
    assert set(dict(pool.books()[3])).isdisjoint(dict(salted.books()[3]))


def test_samples_of_one_prompt_share_its_pages_and_the_first_divergent_token_copies_one():
    pool = PagePool(16, PAGE)
    pool.open(0, prompt(10))
    pool.extend(0, prompt(10))
    for sample in range(1, 4):
        pool.fork(0, sample)
    assert pool.free_pages() == 13
    assert [pool.readers(page) for page in range(3)] == [4, 4, 4]
    copies = []
    for sample in range(4):
        copies.append(pool.extend(sample, [100 + sample]).copied)
    # the last to write has the page for itself by then
    assert copies == [(2, 3), (2, 4), (2, 5), None]
    assert [pool.readers(page) for page in range(6)] == [4, 4, 1, 1, 1, 1]
    for sample in range(4):
        assert pool.extend(sample, [200]).copied is None


def test_a_full_last_page_is_not_copied():
    pool = PagePool(16, PAGE)
    pool.open(0, prompt(8))
    pool.extend(0, prompt(8))
    pool.fork(0, 1)
    assert pool.extend(1, [9]).copied is None
    assert pool.table(0) == [0, 1]
    assert pool.table(1) == [0, 1, 2]


def test_a_full_pool_says_what_is_missing_and_changes_nothing():
    pool = PagePool(3, PAGE)
    pool.open("a", prompt(6))
    pool.extend("a", prompt(6))
    pool.fork("a", "b")
    pool.open("c", prompt(9, 50))
    before = pool.books()
    with pytest.raises(PoolFull) as error:
        pool.extend("c", prompt(9, 50))
    assert error.value.missing == 2
    # the copy of a shared page counts too
    with pytest.raises(PoolFull) as error:
        pool.extend("b", prompt(3))
    assert error.value.missing == 1
    assert pool.books() == before


def test_the_page_that_was_found_first_is_forgotten_with_its_last_reader():
    pool = PagePool(8, PAGE)
    # side by side: neither finds the other's page
    pool.open("a", prompt(5))
    pool.open("b", prompt(5))
    pool.extend("a", prompt(5))
    pool.extend("b", prompt(5))
    pool.release("b")
    assert pool.open("c", prompt(5)) == PAGE
    pool.release("a")
    assert pool.readers(0) == 1
    pool.release("c")
    assert pool.open("d", prompt(5)) == 0


def random_joins_and_leaves(pool, draw, steps):
    """Opens, forks, extends and ends sequences at random, all tokens from a small alphabet."""
    born = 0
    truth = {}
    for _ in range(steps):
        action = draw.choice(["open", "fork", "extend", "extend", "release"])
        alive = list(truth)
        if action == "open":
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 20))]
            found = pool.open(born, tokens)
            try:
                pool.extend(born, tokens[found:])
                truth[born] = tokens
            except PoolFull:
                pool.release(born)
            born += 1
        elif not alive:
            continue
        elif action == "fork":
            parent = draw.choice(alive)
            pool.fork(parent, born)
            truth[born] = list(truth[parent])
            born += 1
        elif action == "extend":
            name = draw.choice(alive)
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 6))]
            try:
                pool.extend(name, tokens)
                truth[name] += tokens
            except PoolFull:
                pool.release(name)
                del truth[name]
        else:
            name = draw.choice(alive)
            pool.release(name)
            del truth[name]
        check_books(pool, truth)
    return truth


def check_books(pool, truth):
    """Readers, free pages and tables agree with each other and with the tokens."""
    readers = [0] * pool.pages
    for name, tokens in truth.items():
        assert pool.tokens(name) == tokens
        assert len(pool.table(name)) == -(-len(tokens) // pool.page_tokens)
        for page in pool.table(name):
            readers[page] += 1
    assert [pool.readers(page) for page in range(pool.pages)] == readers
    assert pool.free_pages() == readers.count(0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 4]))
def test_a_thousand_random_joins_and_leaves_return_the_pool_to_its_first_state(seed, page_tokens):
    draw = random.Random(seed)
    pool = PagePool(24, page_tokens)
    new = pool.books()
    alive = random_joins_and_leaves(pool, draw, 1000)
    for name in alive:
        pool.release(name)
    assert pool.books() == new


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_every_sequence_reads_what_it_wrote(seed):
    """Pages are written as the books say; each token's payload names its whole prefix."""
    draw = random.Random(seed)
    pool = PagePool(24, 3)
    storage = PageStorage(24, 3)
    truth = {}

    def write(name, tokens, found=0):
        extension = pool.extend(name, tokens)
        if extension.copied is not None:
            storage.copy(*extension.copied)
        truth[name] = truth.get(name, []) + list(tokens)
        rows = []
        for index in range(len(truth[name]) - len(tokens), len(truth[name])):
            rows.append(float(hash(tuple(truth[name][: index + 1])) % 2**20))
        payload = torch.tensor(rows)[:, None]
        storage.write(extension.slots, (payload, -payload))

    for step in range(120):
        alive = list(truth)
        kind = draw.choice(["open", "fork", "extend", "extend", "release"])
        try:
            if kind == "open":
                tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 14))]
                found = pool.open(step, tokens)
                truth[step] = tokens[:found]
                write(step, tokens[found:])
            elif alive and kind == "fork":
                parent = draw.choice(alive)
                pool.fork(parent, step)
                truth[step] = list(truth[parent])
            elif alive and kind == "extend":
                write(draw.choice(alive), [draw.randrange(2) for _ in range(4)])
            elif alive:
                name = draw.choice(alive)
                pool.release(name)
                del truth[name]
        except PoolFull:
            name = pool.sequences()[-1]
            pool.release(name)
            del truth[name]
        for name, tokens in truth.items():
            if not tokens:
                continue
            expected = []
            for index in range(len(tokens)):
                expected.append(float(hash(tuple(tokens[: index + 1])) % 2**20))
            first, second = storage.read(pool.slots(name))
            assert first[:, 0].tolist() == expected
            assert torch.equal(second, -first)


def test_swapped_pages_return_under_other_numbers():
    pool = PagePool(6, PAGE)
    storage = PageStorage(6, PAGE)
    pool.open("a", prompt(7))
    value = torch.arange(7.0)[:, None]
    storage.write(pool.extend("a", prompt(7)).slots, (value, value * 2))
    tokens = pool.tokens("a")
    copies = storage.swap_out(pool.table("a"))
    pool.release("a")
    pool.open("b", prompt(4, 50))
    other = torch.full((4, 1), -1.0)
    storage.write(pool.extend("b", prompt(4, 50)).slots, (other, other))
    pool.open("a", tokens)
    pool.extend("a", tokens)
    assert pool.table("a") == [1, 2]
    storage.swap_in(pool.table("a"), copies)
    first, second = storage.read(pool.slots("a"))
    assert torch.equal(first, value)
    assert torch.equal(second, value * 2)
