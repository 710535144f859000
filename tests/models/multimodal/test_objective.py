"""The objective over modalities against its formula, document by document."""

import pytest
import torch
from torch.nn import functional as F

from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.multimodal.columns import ASKED, SHOWN, Columns
from models.span import Span
from tests.support.parity import packed
from tests.support.requests import DOCUMENTS, batch_of, built

WEIGHTS = {
    "text_weight": 0.5,
    "rendering_weight": 2.0,
    "consistency_weight": 3.0,
    "alignment_weight": 0.25,
}
PARTNERS = {(0, 1): 0, (0, 2): 0, (0, 4): 3, (1, 2): 1}  # (row, document): its reference


def stretches(row):
    start = 0
    for modality, length in DOCUMENTS[row]:
        yield modality, slice(start, start + length)
        start += length


def spelled_out(model, batch, divergence, *, stopped, layers):
    """The loss of all documents, by the formula alone."""
    stream = model.embedded(batch.tokens, batch.span)
    outputs = [stream, *model.layer_outputs(stream, batch.span)]
    logits = model.head(model.norm(outputs[-1]))
    loss = 0
    for row in range(2):
        places = list(stretches(row))
        for number, (modality, place) in enumerate(places):
            last = place.stop - 1
            target = batch.targets[row, last]
            if target != IGNORE:
                weight = WEIGHTS["text_weight" if modality == 0 else "rendering_weight"]
                loss = loss + weight * F.cross_entropy(logits[row, last], target)
            if (row, number) not in PARTNERS:
                continue
            other = places[PARTNERS[row, number]][1]
            own = logits[row, last].log_softmax(-1)
            text = logits[row, other.stop - 1].log_softmax(-1)
            text = text.detach() if stopped else text
            if divergence == "reverse":
                kl = (own.exp() * (own - text)).sum()
            else:
                kl = (text.exp() * (text - own)).sum()
            loss = loss + WEIGHTS["consistency_weight"] * kl
            for layer in layers:
                mean = outputs[layer][row, place.start + 1 : last].mean(0)
                wanted = outputs[layer][row, other.start + 1 : other.stop - 1].mean(0)
                wanted = wanted.detach() if stopped else wanted
                cosine = F.cosine_similarity(mean, wanted, dim=0)
                loss = loss + WEIGHTS["alignment_weight"] * (1 - cosine)
    return loss


@pytest.mark.parametrize(
    ("divergence", "stopped", "layers"),
    [("reverse", True, [0, 1, 2]), ("forward", False, [1]), ("reverse", False, [])],
)
def test_it_is_the_formula(divergence, stopped, layers):
    batch = batch_of(DOCUMENTS)
    settings = dict(WEIGHTS, divergence=divergence, stop_gradient=stopped, alignment_layers=layers)
    model = built(**settings)
    got = model(batch).sum()
    got.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    want = spelled_out(model, batch, divergence, stopped=stopped, layers=layers)
    want.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        difference = (gradient - parameter.grad).abs().max()
        assert difference <= 1e-12 * max(1, float(parameter.grad.abs().max()))


def test_no_gradient_goes_into_the_text_that_stands_still():
    weights = {"text_weight": 0.0, "rendering_weight": 0.0}
    batch = batch_of(DOCUMENTS)
    for stopped in (True, False):
        model = built(stop_gradient=stopped, **weights)
        stream = model.embedded(batch.tokens, batch.span).detach().requires_grad_()
        outputs = [stream, *model.layer_outputs(stream, batch.span)]
        columns = Columns.of(batch.tokens, batch.span, 0)
        loss = model.objective(
            model.norm(outputs[-1]),
            outputs,
            columns,
            batch.span,
            batch.targets,
            head=model.head.weight,
            cap=None,
        ).sum()
        [gradient] = torch.autograd.grad(loss, stream)
        of_text = gradient[columns.reference].abs().max()
        assert (of_text == 0) == stopped
        assert gradient[columns.part == SHOWN].abs().max() > 0


def test_terms_are_logged_without_their_weights():
    batch = batch_of(DOCUMENTS)
    one, other = built(), built(**WEIGHTS)
    logs = []
    for model in (one, other):
        model(batch).sum().backward()
        logs.append(model.objective.on_step_end(model.objective.auxiliary_sums.statistics))
    assert logs[0] == logs[1] and set(logs[0]) == {
        "text",
        "rendering",
        "consistency",
        "alignment",
    }
    assert all(value > 0 for value in logs[0].values())


def test_terms_of_weight_zero_are_left_out():
    model = built(consistency_weight=0.0, alignment_weight=0.0)
    model(batch_of(DOCUMENTS))
    assert set(model.objective.auxiliary_sums.statistics) == {"text", "rendering"}


def test_bare_numbers_are_an_example_with_pairs():
    span = packed([[4, 5, 3], [2, 6]], 14)
    tokens = torch.arange(28).view(2, 14) % 11
    columns = Columns.of(tokens, span, 3)
    assert columns.reference[0].tolist() == [True] * 4 + [False] * 5 + [True] * 3 + [False] * 2
    assert columns.part[0, :5].tolist() == [ASKED, SHOWN, SHOWN, SHOWN, ASKED]
    assert columns.part[0, 12:].tolist() == [0, 0]
    model = built()
    model(MicroBatch(tokens, Span.of(span.pos, span.doc), tokens)).sum()
    assert model.objective.auxiliary_sums.statistics["consistency"][1] == 2
