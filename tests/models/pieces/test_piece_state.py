"""A row in pieces against the same row at once: outputs and every gradient, in float64."""

import pytest
import torch
from torch import Tensor, nn

from models.carried_state import CarriedState, name_stateful_modules
from models.causality import layers_ahead
from models.pieces.cuttable import cannot_be_cut
from models.pieces.piece_state import PieceState
from models.span import Span
from parallel.rows_in_time import run_in_pieces
from tests.support.decoders import MODELS, built
from tests.support.parity import build, given, packed, relative, truth
from tests.support.row_pieces import carries, differences, pieces_of, run_steps
from tests.variants import VARIANTS

# Tokens of the pieces of a row of 51: cuts inside documents, on their ends, and a piece of one.
CUTS = {2: [20, 31], 3: [14, 1, 36], 5: [13, 11, 7, 8, 12]}

CAUSAL = [name for name in VARIANTS if not layers_ahead(VARIANTS[name]())]


def in_pieces(
    model: nn.Module, x: Tensor, weight: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Adds gradients to the parameters; returns the output and the gradient of x."""
    state = PieceState(pieces_of(packed(), sizes))
    parts = [part.clone().requires_grad_() for part in x.split(sizes, 1)]
    weights = weight.split(sizes, 1)
    outputs = list(parts)

    def learn(number: int, span: Span) -> Tensor:
        outputs[number] = model(parts[number], span)
        return (outputs[number] * weights[number]).sum()

    def look_ahead(number: int, span: Span) -> None:
        outputs[number] = model(parts[number], span)

    def backward(loss: Tensor, last: bool) -> None:
        loss.backward()

    run_in_pieces(state, look_ahead, learn, backward)
    d_x = [part.grad if part.grad is not None else torch.zeros_like(part) for part in parts]
    return torch.cat(outputs, 1).detach(), torch.cat(d_x, 1)


@pytest.mark.parametrize("count", CUTS)
@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_mixer_has_the_gradients_of_the_whole_row(name: str, count: int):
    x, weight = given(torch.float64)
    want, d_x, d_parameters = truth(name, torch.float64)
    model = build(name)
    name_stateful_modules(model)
    output, gradient = in_pieces(model, x, weight, CUTS[count])
    valid = packed().valid()[..., None]
    assert relative(output * valid, want * valid) < 1e-11
    assert relative(gradient * valid, d_x * valid) < 1e-11
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (key not in d_parameters), key
        if parameter.grad is not None:
            assert relative(parameter.grad, d_parameters[key]) < 1e-11, key


# Of rows of 17 tokens: cuts inside documents, on their ends, and a piece of one.
LANE_CUTS = {2: [5, 12], 3: [6, 1, 10], 5: [3, 4, 2, 3, 5]}


@pytest.mark.short(
    "full",
    "sinusoidal",
    "hybrid",
    "shared_values",
    "experts_topk",
    "experts_switch",
    "memory_segments",
    "memory_compressive",
    "memory_lookup",
    "lstm",
    "ntm",
    "key_value",
)
@pytest.mark.parametrize("name", [name for name in MODELS if not cannot_be_cut(built(name))])
def test_whole_models_with_memories_and_experts(name: str):
    for sizes in LANE_CUTS.values():
        past = CarriedState() if carries(name) else None
        found = differences(run_steps(built(name).train(), past, sizes), name)
        assert max(found.values()) < 1e-11, (sizes, found)
