"""Greedy tokens of a model from a folder are those of transformers' `generate`."""

import torch

from tests.support import hub
from trainer.decoding.scheduler import Scheduler, TextRequest

PROMPTS = (7, 1, 40)
TOKENS = 60


def test_mamba2_goes_on_from_its_states(tmp_path):
    theirs = hub.make("Mamba2Config", {**hub.SMALL_MAMBA2, "n_groups": 2}, tmp_path)
    scheduler = Scheduler(hub.ours(tmp_path), rows=3)
    generator = torch.Generator().manual_seed(1)
    asked = []
    for length in PROMPTS:
        prompt = torch.randint(hub.WORDS, (length,), generator=generator)
        request = TextRequest(prompt.tolist(), TOKENS)
        scheduler.submit(request)
        asked.append((request, prompt))
    list(scheduler.run())
    different = set()
    for request, prompt in asked:
        with torch.no_grad():
            # No token ends a text, and none is padding, as it is there where no mask says so.
            want = theirs.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        assert request.tokens == want[0, len(prompt) :].tolist()
        different.update(request.tokens)
    assert len(different) > 5
