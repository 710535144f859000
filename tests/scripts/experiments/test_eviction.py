"""The recipes about caches ask what they say, and read with caches what whole rows give."""

import torch

from models.cache.contiguous import Contiguous
from models.cache.eviction.window import Window
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span
from scripts.experiments import eviction, quantized


def test_questions_are_about_few_keys_and_answers_are_not_in_the_text():
    tokens, targets = eviction.rows_of(20, (2, 2), torch.Generator().manual_seed(0))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:20:2], row[1:20:2], strict=True))
        assert len(pairs) == eviction.PAIRS
        assert wanted[:20] == [IGNORE] * 20
        assert wanted[20:] == [pairs[key] for key in row[20:]]
        assert len(set(row[20:])) == 2


@torch.no_grad()
def test_an_exam_token_by_token_equals_one_of_whole_rows():
    model = eviction.small_model(eviction.SIZES, eviction.VOCABULARY, 0).double().eval()
    tokens, _ = eviction.rows_of(4, (2, 2), torch.Generator().manual_seed(0))
    logits = model(MicroBatch(tokens, Span.line(*tokens.shape)))
    # the answers of the model itself, but for those to one key
    targets = logits.argmax(-1)
    targets[:, 40:] = -1
    share = 12 / 36
    assert eviction.accuracy(model, tokens, targets, Contiguous()) == share
    assert eviction.accuracy(model, tokens, targets, Window(4)) < share


def test_claims_that_fail_are_named():
    found = {
        ("stream", "h2o", 16): 0.7,
        ("stream", "window", 16): 0.1,
        ("prompt", "snapkv", 10): 0.95,
    }
    assert eviction.broken_claims(found) == "does not hold: h2o >= 0.8 at a quarter"
    assert eviction.broken_claims({**found, ("stream", "h2o", 16): 0.8}) is None


@torch.no_grad()
def test_perplexity_in_pieces_is_that_of_whole_rows():
    model = quantized.small_model(quantized.SIZES, 256, 0).double().eval()
    text = torch.randint(256, (3000,), generator=torch.Generator().manual_seed(0))
    rows = quantized.crops(text, 2, quantized.LENGTH + 1, torch.Generator().manual_seed(0))
    losses = model(MicroBatch(rows[:, :-1], Span.line(2, quantized.LENGTH), rows[:, 1:]))
    whole = losses[:, quantized.SKIPPED :].mean().exp().item()
    found, held = quantized.perplexity(model, rows, Contiguous())
    assert abs(found - whole) < 1e-9
    few, fewer = quantized.perplexity(model, rows, quantized.CACHES["2 bits"]())
    assert few != found and fewer < held / 3
