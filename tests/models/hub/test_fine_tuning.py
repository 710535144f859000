"""Thirty steps of fine-tuning here are thirty steps of transformers and torch's AdamW by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.loss import IGNORE
from models.micro_batch import MicroBatch
from parallel.engines.single import Single
from parallel.mesh import Mesh
from tests.support import hub
from tests.support.hub import SMALL, SMALL_GPT2, SMALL_MIXTRAL
from trainer.optim.adamw import AdamW

RATE = 1e-3
# Mixtral's own base of the rotary positions is another than that of ExactRotary.
ROTATED_MIXTRAL = {
    **SMALL_MIXTRAL,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


class ExactRotary(nn.Module):
    """Their rotary angles in float64; their own module computes in float32."""

    def forward(self, hidden, position_ids):
        pair = torch.arange(4, dtype=torch.float64) / 4
        angle = position_ids[..., None].double() * 10_000.0**-pair
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


class ExactRouter(nn.Module):
    """Mixtral's choice of experts in float64; their own takes the softmax in float32."""

    def __init__(self, theirs):
        super().__init__()
        self.weight = theirs.weight
        self.top_k = theirs.top_k

    def forward(self, hidden):
        logits = F.linear(hidden.flatten(0, -2), self.weight)
        best = logits.topk(self.top_k, -1)
        return logits, best.values.softmax(-1), best.indices


def exact(theirs):
    """Replaces what they compute in float32: norms, rotary angles and the choice of experts."""
    if hasattr(theirs.base_model, "rotary_emb"):
        theirs.base_model.rotary_emb = ExactRotary()
    for module in list(theirs.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif type(child).__name__ == "MixtralTopKRouter":
                setattr(module, name, ExactRouter(child))
    return theirs


@pytest.mark.parametrize(
    "name, settings",
    [("LlamaConfig", SMALL), ("GPT2Config", SMALL_GPT2), ("MixtralConfig", ROTATED_MIXTRAL)],
    ids=["llama", "gpt2", "mixtral"],
)
def test_thirty_steps_equal_those_by_hand(name, settings, tmp_path):
    theirs = exact(hub.make(name, settings, tmp_path))
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
