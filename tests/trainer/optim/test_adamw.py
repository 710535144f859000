"""Weight decay falls on matrices only, the state is there before the first step, and bad numbers
are refused."""

import pytest
import torch
from torch import nn

from models.convolution.hyena import Hyena
from parallel.engines.single import Single
from parallel.mesh import build_mesh
from tests.support.pool import ranks
from tests.support.small_model import Small
from trainer.optim.adamw import AdamW, decayed_parameters, lr_scales


class Rates(nn.Module):
    """A module that says which of its own parameters are matrices of a linear layer, and that a
    linear layer is none."""

    weight_decay = "mix", "absent"
    no_weight_decay = ("filter",)

    def __init__(self):
        super().__init__()
        self.rate, self.mix = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
        self.filter, self.absent = nn.Linear(2, 3), None


def groups(model, **settings):
    optimiser = AdamW(**settings)(model, dict(model.named_parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in optimiser.param_groups
    }


def test_only_matrices_decay():
    found = groups(Small(tie=False), weight_decay=0.3)
    assert found[0.3] == {
        f"blocks.{i}.{side}.weight" for i in (0, 1) for side in ("up", "down")
    } | {"head.weight"}
    assert found[0.0] >= {"embedding.weight", "norm.weight", "blocks.0.up.bias"}


def test_a_tied_embedding_is_an_embedding():
    assert "embedding.weight" not in decayed_parameters(
        Small(tie=True)
    ) and "head.weight" not in decayed_parameters(Small(tie=True))


def test_a_module_may_name_what_is_a_matrix_and_what_is_none():
    assert decayed_parameters(Rates()) == {"mix"}


def test_the_filters_of_hyena_do_not_decay_and_learn_at_their_own_pace():
    layer = nn.ModuleDict({"mixer": Hyena(4, 8, filter_width=3, bands=2, filter_rate=0.25)})
    filters = {name for name, _ in layer.named_parameters() if name.startswith("mixer.filter.")}
    assert len(filters) == 6 and decayed_parameters(layer) == {
        f"mixer.{name}.weight" for name in ("inner", "short", "out")
    }
    assert lr_scales(layer) == dict.fromkeys(filters, 0.25)
    optimiser = AdamW(weight_decay=0.3)(layer, dict(layer.named_parameters()))
    names = {id(p): name for name, p in layer.named_parameters()}
    found = {
        (g["rate"], g["weight_decay"]): {names[id(p)] for p in g["params"]}
        for g in optimiser.param_groups
    }
    assert found == {
        (1.0, 0.3): decayed_parameters(layer),
        (1.0, 0.0): {"mixer.bias"},
        (0.25, 0.0): filters,
    }


def test_a_pace_that_is_none_is_refused():
    with pytest.raises(ValueError, match="filter_rate=0"):
        Hyena(4, 8, filter_rate=0)


class Halved(nn.Module):
    """Two parameters with equal gradients, one of which learns at half the pace."""

    lr_scale = {"slow": 0.5}

    def __init__(self):
        super().__init__()
        self.slow, self.fast = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))


def moves(env):
    """How far each parameter of Halved goes in steps at two learning rates, all its gradients being
    equal."""
    model = Halved()
    engine = Single(build_mesh(1, env.size), AdamW(weight_decay=0.0), precision="float64")
    engine.wrap(model)
    found = []
    for rate in (0.1, 0.04):
        before = [p.detach().clone() for p in (model.fast, model.slow)]
        engine.backward((model.fast + model.slow).sum())
        engine.step(rate)
        found.append(
            [
                float((then - now.detach()).mean())
                for then, now in zip(before, (model.fast, model.slow))
            ]
        )
    return found


def test_an_engine_steps_at_each_groups_own_pace():
    for found in ranks(2, moves):
        assert found == [[pytest.approx(rate), pytest.approx(rate / 2)] for rate in (0.1, 0.04)]


def test_every_parameter_is_trained_once():
    found = groups(Small())
    assert found[0.1] | found[0.0] == {name for name, _ in Small().named_parameters()}
    assert not found[0.1] & found[0.0]


def test_a_frozen_parameter_is_not_trained():
    model = Small()
    model.norm.weight.requires_grad_(False)
    assert "norm.weight" not in groups(model)[0.0]


def test_the_state_made_beforehand_is_what_torch_makes():
    ours, theirs = Small(tie=False), Small(tie=False)
    theirs.load_state_dict(ours.state_dict())
    settings = AdamW(weight_decay=0.2)
    optimiser = settings(ours, dict(ours.named_parameters()))
    decays = decayed_parameters(theirs)
    plain = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.2 if name in decays else 0.0}
            for name, p in theirs.named_parameters()
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )
    for _ in range(2):
        for model, steps in ((ours, optimiser), (theirs, plain)):
            (sum((p * p).sum() for p in model.parameters())).backward()
            steps.step()
            steps.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)
        assert plain.state[q].keys() == optimiser.state[p].keys()
        assert all(
            torch.equal(plain.state[q][key], optimiser.state[p][key]) for key in plain.state[q]
        )
        assert all(
            plain.state[q][key].dtype == optimiser.state[p][key].dtype for key in plain.state[q]
        )


@pytest.mark.parametrize("pieces", [2, 3, 7, 769])
def test_the_update_has_the_same_bits_however_a_parameter_is_cut(pieces):
    torch.manual_seed(0)
    start, gradients = torch.randn(10007), [torch.randn(10007) for _ in range(3)]

    def updated(count):
        model = nn.Module()
        for i, part in enumerate(start.tensor_split(count)):
            model.register_parameter(f"p{i}", nn.Parameter(part.clone()))
        optimiser = AdamW()(model, dict(model.named_parameters()))
        for gradient in gradients:
            for parameter, part in zip(model.parameters(), gradient.tensor_split(count)):
                parameter.grad = part.clone()
            optimiser.step()
        return torch.cat([p.detach() for p in model.parameters()])

    assert torch.equal(updated(1), updated(pieces))


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0},
        {"learning_rate": -1},
        {"learning_rate": float("nan")},
        {"eps": 0},
        {"weight_decay": -0.1},
        {"max_grad_norm": -1},
        {"max_grad_norm": float("inf")},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
    ],
)
def test_a_number_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"optim.{next(iter(wrong))}="):
        AdamW(**wrong)
