"""Greedy tokens equal those of transformers' `generate` with the same weights, 200 of them."""

import pytest
import torch

from scripts.benchmarks.decode import VOCABULARY, peers_greedy, twins
from trainer.decoding.scheduler import Scheduler, TextRequest

PROMPTS = (7, 23, 40)


@pytest.mark.parametrize("window", [None, 16])
def test_tokens_of_uneven_prompts(window):
    theirs, ours = twins(32, 2, 4, 2, window=window)
    generator = torch.Generator().manual_seed(1)
    scheduler = Scheduler(ours, rows=3)
    asked = []
    for length in PROMPTS:
        prompt = torch.randint(VOCABULARY, (length,), generator=generator)
        request = TextRequest(prompt.tolist(), 200)
        scheduler.submit(request)
        asked.append((request, prompt))
    list(scheduler.run())
    for request, prompt in asked:
        assert request.tokens == peers_greedy(theirs, prompt[None], 200)[0].tolist()
