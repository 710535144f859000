"""Sampling against loops that are written out."""

import math

import pytest
import torch

from trainer.decoding.sampling import (
    Sampling,
    choose,
    inverse_cdf,
    min_p,
    penalised,
    top_k,
    top_p,
    uniform,
)

GENERATOR = torch.Generator().manual_seed(5)
ROWS = [3 * torch.randn(12, generator=GENERATOR, dtype=torch.float64) for _ in range(6)]


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(x - largest) if x > -math.inf else 0.0 for x in logits]
    return [weight / sum(weights) for weight in weights]


def left(logits):
    return {token for token, value in enumerate(logits.tolist()) if value > -math.inf}


@pytest.mark.parametrize("logits", ROWS)
def test_filters_leave_what_loops_leave(logits):
    values = logits.tolist()
    likely = sorted(range(12), key=lambda token: -values[token])
    probabilities = softmax(values)
    assert left(top_k(logits, 4)) == set(likely[:4])
    assert left(top_k(logits, 0)) == left(top_k(logits, 12)) == set(range(12))
    for share in (0.3, 0.8, 0.999):
        nucleus = set()
        total = 0.0
        for token in likely:
            if total >= share:
                break
            nucleus.add(token)
            total += probabilities[token]
        assert left(top_p(logits, share)) == nucleus
    for share in (0.05, 0.5, 1.0):
        most = max(probabilities)
        wanted = {token for token in range(12) if probabilities[token] >= share * most}
        assert left(min_p(logits, share)) == wanted
    for token, value in enumerate(penalised(logits, {2, 7, 8}, 1.7).tolist()):
        wanted = values[token]
        if token in (2, 7, 8):
            wanted = wanted / 1.7 if wanted > 0 else wanted * 1.7
        assert value == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize("logits", ROWS)
def test_a_choice_is_the_running_sum_in_order(logits):
    sampling = Sampling(temperature=0.7, top_k=6, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    for number in (0.0, 0.1, 0.5, 0.9, 1 - 2**-53):
        left_over = penalised(logits, {1, 4}, 1.2) / 0.7
        left_over = min_p(top_p(top_k(left_over, 6), 0.95), 0.01)
        probabilities = softmax(left_over.tolist())
        total = 0.0
        wanted = None
        reached = 0.0
        for token, probability in enumerate(probabilities):
            total += probability
            if probability and (wanted is None or number >= reached):
                wanted = token
            reached = total
        assert choose(logits, sampling, (1, 4), number) == wanted
    assert choose(logits, Sampling(temperature=0), (), 0.3) == int(logits.argmax())


def test_tokens_without_probability_are_never_drawn():
    probabilities = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    assert {inverse_cdf(probabilities, n) for n in (0.0, 0.49, 0.5, 1 - 2**-53)} == {1, 2}


def test_numbers_are_a_function_of_names_and_uniform():
    numbers = [uniform(3, "sample", index) for index in range(2000)]
    assert numbers == [uniform(3, "sample", index) for index in range(2000)]
    assert uniform(3, "sample", 0) != uniform(4, "sample", 0)
    assert all(0 <= number < 1 for number in numbers)
    counts = torch.histc(torch.tensor(numbers), 10, 0, 1)
    assert ((counts - 200) ** 2 / 200).sum() < 28  # chi squared, 9 degrees: 1 in 1000


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}="):
        Sampling(**settings)
