"""Induction: a head that was built is found, copies, and is missed; uniform heads are not."""

import numpy as np
import pytest
import torch
from torch import nn

from models.analysis.attention_maps import collect, leaves
from models.analysis.heads import head_scores
from models.loss import IGNORE, token_losses
from models.masks.basic import Causal, SameDocument
from models.primitives.softmax import Softmax
from models.span import Span
from parallel.mesh import Mesh
from tests.support.evaluations import Uniform, context_of
from tests.trainer.evaluation.test_evaluations import config, folder, stream  # noqa: F401
from trainer.evaluation.induction import Induction

VOCABULARY = 257
SHARP = 60.0


class HandBuilt(nn.Module):
    """One softmax of three heads: induction, previous token, and uniform.

    Args:
        sharp: of the first two heads; 0 = all are uniform.
    """

    def __init__(self, sharp: float = SHARP):
        super().__init__()
        self.mix = Softmax(Causal() & SameDocument())
        self.sharp = sharp
        self.head = nn.Linear(VOCABULARY, VOCABULARY, bias=False).double()
        with torch.no_grad():
            self.head.weight.copy_(SHARP * torch.eye(VOCABULARY))

    def forward(self, batch):
        tokens, span, targets, _ = batch
        own = nn.functional.one_hot(tokens, VOCABULARY).double()
        place = nn.functional.one_hot(span.pos, VOCABULARY).double()
        before = torch.zeros_like(own)
        before[:, 1:] = own[:, :-1]
        after = nn.functional.one_hot(span.pos + 1, VOCABULARY).double()
        scale = VOCABULARY**0.5 * self.sharp
        query = torch.stack([own * scale, place * scale, own * 0], 2)
        key = torch.stack([before, after, own], 2)
        value = torch.stack([own, own * 0, own * 0], 2)
        heads = self.mix((query,), (key, value), span=span)
        hidden = heads.sum(2)
        if targets is None:
            return self.head(hidden)
        return token_losses(hidden, self.head.weight, targets)


def test_a_head_that_was_built_is_found_and_missed(folder, config):  # noqa: F811
    context = context_of(HandBuilt(), Mesh.alone(), stream(folder), config)
    score, previous, accuracy, ablated = Induction(length=12, examples=2).run(context)
    assert score.value == pytest.approx(1.0, abs=1e-6) and accuracy.value == 1.0
    assert previous.value == pytest.approx(1.0, abs=1e-6)
    assert ablated.value == pytest.approx(1 / VOCABULARY)
    patterns = [cell["pattern"] for cell in score.cells]
    assert patterns == ["induction", "previous_token", "other"]
    # Without the head every token is alike, with it the right one is certain.
    assert score.cells[0]["copying"] == pytest.approx(np.log(VOCABULARY), abs=1e-3)
    assert "copying" not in score.cells[1]


def test_uniform_heads_get_the_chance_that_is_said(folder, config):  # noqa: F811
    context = context_of(HandBuilt(sharp=0.0), Mesh.alone(), stream(folder), config)
    score, previous, accuracy, ablated = Induction(length=12, examples=2).run(context)
    assert score.value == pytest.approx(score.chance)
    assert previous.value == pytest.approx(previous.chance)
    assert accuracy.value == ablated.value < 0.2


def test_a_model_without_softmax_has_its_accuracy_alone(folder, config):  # noqa: F811
    context = context_of(Uniform(), Mesh.alone(), stream(folder), config)
    [accuracy] = Induction(length=12, examples=1).run(context)
    assert accuracy.name == "accuracy" and accuracy.value == pytest.approx(accuracy.chance)


def test_scores_of_heads_are_what_they_say_on_text():
    model = HandBuilt()
    text = list(b"abcabdabc")
    tokens = torch.tensor([text])
    maps = collect(model, leaves(model), tokens, Span.line(1, len(text)))
    first, second, third = head_scores(maps[0], text)
    # The tokens after an earlier equal: all but the first three and d, whose letters are new.
    assert first.induction == pytest.approx(1.0, abs=1e-6) and first.layer == "mix"
    assert second.previous_token == pytest.approx(1.0, abs=1e-6)
    uniform = np.mean([1 / (place + 1) for place in range(1, len(text))])
    assert third.sink == pytest.approx(uniform)
    wanted = np.mean([np.log(place + 1) for place in range(len(text))])
    assert third.entropy == pytest.approx(wanted) and third.pattern == "other"
    with pytest.raises(ValueError, match="a map of"):
        head_scores(maps[0], [*text, 1, 2, 3])


def test_targets_are_the_second_half():
    row = Induction().row(np.array([5, 6, 7]))
    assert row.tokens.tolist() == [5, 6, 7, 5, 6, 7]
    assert row.targets.tolist() == [IGNORE] * 3 + [6, 7, IGNORE]
