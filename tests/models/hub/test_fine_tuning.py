"""Thirty steps of fine-tuning here are thirty steps of transformers and torch's AdamW by hand."""

import pytest
import torch
from torch.nn import functional as F

from models.loss import IGNORE
from models.micro_batch import MicroBatch
from parallel.engines.single import Single
from parallel.mesh import Mesh
from tests.models.hub.test_adapters import CASES
from tests.support import hub
from trainer.optim.adamw import AdamW

RATE = 1e-3
QUICK = ("llama", "gpt2", "mixtral")
ADAPTED = [
    *QUICK,
    *(pytest.param(case, marks=pytest.mark.full) for case in CASES if case not in QUICK),
]


@pytest.mark.parametrize("case", ADAPTED)
def test_thirty_steps_equal_those_by_hand(case, tmp_path):
    theirs = hub.exact(hub.make(*CASES[case], tmp_path))
    engine = Single(
        Mesh.alone(), AdamW(RATE, weight_decay=0.0, max_grad_norm=0.0), precision="float64"
    )
    engine.wrap(hub.ours(tmp_path).train())
    by_hand = torch.optim.AdamW(
        theirs.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    tokens, span, targets = hub.rows()
    valid = int((targets != IGNORE).sum())
    losses = []
    wanted = []
    for _ in range(30):
        loss = engine.model(MicroBatch(tokens, span, targets)).sum() / valid
        engine.backward(loss)
        engine.step(RATE)
        losses.append(loss.item())
        total = torch.zeros((), dtype=torch.float64)
        for _, _, document in hub.documents():
            if document.shape[1] > 1:
                logits = theirs(document, use_cache=False).logits[0, :-1]
                total = total + F.cross_entropy(logits, document[0, 1:], reduction="sum") / valid
        total.backward()
        by_hand.step()
        by_hand.zero_grad()
        wanted.append(total.item())
    assert losses[-1] < losses[0] - 0.3
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)
