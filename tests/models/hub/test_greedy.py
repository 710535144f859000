"""Greedy tokens of a model from a folder are those of transformers' `generate`."""

import pytest
import torch

from tests.support import hub
from trainer.decoding.scheduler import Scheduler, TextRequest

PROMPTS = (7, 1, 40)
TOKENS = 60
CASES = {
    "llama": ("LlamaConfig", hub.SMALL),
    "mistral": ("MistralConfig", {**hub.SMALL, "sliding_window": 9}),
    "gpt2": ("GPT2Config", hub.SMALL_GPT2),
    "gpt_oss": ("GptOssConfig", hub.SMALL_OSS),
    "deepseek_v3": ("DeepseekV3Config", hub.SMALL_DEEPSEEK),
    "mamba2": ("Mamba2Config", {**hub.SMALL_MAMBA2, "n_groups": 2}),
}


@pytest.mark.short("llama", "gpt_oss", "mamba2")
@pytest.mark.parametrize("case", CASES)
def test_texts_go_on_as_there(case, tmp_path):
    theirs = hub.make(*CASES[case], tmp_path)
    scheduler = Scheduler(hub.ours(tmp_path, "context_length=128"), rows=3)
    generator = torch.Generator().manual_seed(1)
    asked = []
    for length in PROMPTS:
        prompt = torch.randint(1, hub.WORDS, (length,), generator=generator)
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
    assert len(different) >= 5  # else the weights would say little
