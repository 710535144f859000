"""Facts are true, a question is answered by the facts shown, and by nothing that could be known by
heart."""

from collections import Counter

import numpy as np
import pytest

from trainer.data.tasks.facts import FOLLOWED_BY, OPENING, Facts, functions, modules


def examples(task, count):
    random = np.random.default_rng(0)
    return [task.example(random) for _ in range(count)]


def told(example):
    """(facts as pairs, subject, answer)."""
    opening, *tokens = example.tokens.tolist()
    assert opening == OPENING and set(tokens[1::3]) == {FOLLOWED_BY}
    pairs = list(zip(tokens[0::3], tokens[2::3]))
    return pairs[:-1], *pairs[-1]


@pytest.mark.parametrize("hops", [1, 2])
def test_the_answer_is_found_by_following_facts(hops):
    sizes = set()
    for example in examples(Facts(hops=hops), 200):
        facts, subject, answer = told(example)
        follows = dict(facts)
        assert len(follows) == len(facts), "nobody is the subject of two facts"
        here = subject
        for _ in range(hops):
            here = follows[here]
        assert here == answer
        assert subject in follows.values(), "who is asked for is also the object of a fact"
        assert example.given.tolist() == [True] * (len(example.tokens) - 1) + [False]
        sizes.add(len(facts))
    assert sizes == {(hops + 1) * many for many in range(2, 7)}


def test_facts_are_true_forwards_or_backwards_and_both_are_as_frequent():
    task, ways = Facts(), Counter()
    order = {name: place for module in task.modules for place, name in enumerate(module)}
    home = {name: number for number, module in enumerate(task.modules) for name in module}
    for example in examples(task, 400):
        facts, subject, answer = told(example)
        for a, b in [*facts, (subject, answer)]:
            first, second = task.words[a], task.words[b]
            assert home[first] == home[second]
            ways[order[second] - order[first]] += 1
    assert set(ways) == {1, -1} and 0.4 < ways[1] / ways.total() < 0.6


def test_entities_are_functions_of_this_pythons_library():
    found = modules(60)
    assert sum(map(len, found)) == 60
    assert (
        "calendar.isleap" in {name for module in modules(256) for name in module}
        and len(set(sum(found, ()))) == 60
    )
    assert functions(
        "def a(): pass\nclass C:\n    def no(self): pass\ndef b(): pass\ndef a(): pass\n"
    ) == ["a", "b"]
    assert functions("def (") == []


def test_settings_that_make_no_task_are_refused():
    with pytest.raises(ValueError, match=r"data.entities=10"):
        Facts(entities=10)
    with pytest.raises(ValueError, match=r"data.entities=1000000: this Python has \d+"):
        Facts(entities=1_000_000)
    with pytest.raises(ValueError, match=r"data.hops=0"):
        Facts(hops=0)


def test_a_sample_shows_names():
    task = Facts(entities=100)
    example = examples(task, 1)[0]
    text = task.tokenizer().decode(example.tokens)
    assert (
        text.startswith("? ")
        and " -> " in text
        and (task.tokenizer().encode(text) == example.tokens).all()
    )
    with pytest.raises(ValueError, match="'def' is no token of this task"):
        task.tokenizer().encode("def")
