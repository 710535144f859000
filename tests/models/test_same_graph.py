"""Which parameters get a gradient does not depend on the rows: else ranks with other rows would
exchange other things."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from models.init import initialise
from models.micro_batch import MicroBatch
from models.same_graph import tied
from tests.support.families import family
from tests.support.parity import packed
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.verify.diagnosis import example_source

CONF = Path(__file__).parents[2] / "conf"
TOKENS, WORDS = 24, 20
ROWS = {
    "uneven": packed([[13, 1, 9], [3, 20, 1]], TOKENS),
    "single segments": packed([[3], [1]], TOKENS),
    "single tokens": packed([[1, 1], [1]], TOKENS),
    "whole": packed([[TOKENS], [TOKENS]], TOKENS),
    "padding": packed([[], []], TOKENS),
}
SIZES = (
    "model.width=16",
    "model.heads=2",
    "model.kv_heads=2",
    "model.layers=2",
    "model.ffn=12",
    f"context_length={TOKENS}",
)
MORE = {
    "memory=lookup": ("memory.length=24", "memory.layers=[0]"),
    "memory=tokens": ("memory.length=2", "memory.segment=8"),
    "memory=compressive": ("memory.segment=8",),
}


# Of a hub model the layers are the catalogue's; it takes their sizes from a folder.
WITHOUT_LAYERS_OF_THEIR_OWN = {"decoder", "hub"}


def yamls(group):
    names = {path.stem for path in (CONF / group).glob("*.yaml")} - WITHOUT_LAYERS_OF_THEIR_OWN
    mixers = {path.stem for path in (CONF / "mixer").glob("*.yaml")}
    return sorted(f"{group}={name}" for name in (names - mixers if group == "model" else names))


CASES = [
    *(word for group in ("mixer", "position", "memory", "model") for word in yamls(group)),
    "model=rwkv6",  # their feed-forward layers are their own
    "model=rwkv7",
]


def built(config):
    model = initialise(build_model(config, WORDS), 1)
    for module in model.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
    return model


def with_gradient(model, span):
    """Names of the parameters with a gradient, and of all."""
    # A layer may keep something of the rows before.
    model = deepcopy(model)
    tokens = torch.randint(0, WORDS, span.shape)
    targets = tokens.masked_fill(~span.valid(), -100)
    source = example_source(model, WORDS, span)
    loss = model(MicroBatch(tokens, span, targets, source)).sum()
    for module in model.modules():
        for extra in (getattr(module, "auxiliary", None) or {}).values():
            loss = loss + extra.sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    return names, {name for name, _ in model.named_parameters()}


def first_of_each(words):
    """Marks all but the first of every family, which `make test` leaves out."""
    met = set()
    for word in words:
        marks = [pytest.mark.full] if family(word) in met else []
        met.add(family(word))
        yield pytest.param(word, marks=marks)


@pytest.mark.parametrize("word", first_of_each(CASES))
def test_all_rows_give_the_same_parameters_a_gradient(word):
    asked = compose(
        (word, "wandb.mode=disabled", f"model.vocabulary={WORDS}", *SIZES, *MORE.get(word, ()))
    )
    assert asked.config is not None, asked.faults
    model = built(asked.config)
    for rows, span in ROWS.items():
        names, every = with_gradient(model, span)
        assert names == every, f"{rows}: {sorted(every - names)}"


def test_what_is_tied_gets_zeros_beside_what_it_has():
    used, idle, x = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    y = tied(x * used, used, idle)
    assert torch.equal(y, x * used)
    y.sum().backward()
    assert (
        torch.equal(used.grad, x)
        and torch.equal(idle.grad, torch.zeros(2, 3))
        and torch.equal(x.grad, used)
    )
