"""Weight decay falls on matrices only, the state is there before the first step, and bad numbers are refused."""

import pytest
import torch
from torch import nn

from tests.parallel.engines.small import Small
from trainer.optim import AdamW, decayed


class Rates(nn.Module):
    """A module that names what is no matrix although it has two dims."""

    undecayed = ("rate",)

    def __init__(self):
        super().__init__()
        self.rate, self.mix = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))


def groups(model, **settings):
    optimiser = AdamW(**settings)(model, dict(model.named_parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimiser.param_groups}


def test_only_matrices_decay():
    found = groups(Small(tie=False), weight_decay=0.3)
    assert found[0.3] == {f"blocks.{i}.{side}.weight" for i in (0, 1) for side in ("up", "down")} | {"head.weight"}
    assert found[0.0] >= {"embedding.weight", "norm.weight", "blocks.0.up.bias"}


def test_a_tied_embedding_is_an_embedding():
    assert "embedding.weight" not in decayed(Small(tie=True)) and "head.weight" not in decayed(Small(tie=True))


def test_a_module_may_name_what_is_no_matrix():
    assert decayed(Rates()) == {"mix"}


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
    decays = decayed(theirs)
    plain = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.2 if name in decays else 0.0}
            for name, p in theirs.named_parameters()
        ],
        lr=settings.learning_rate, betas=settings.betas, eps=settings.eps,
    )  # fmt: skip
    for _ in range(2):
        for model, steps in ((ours, optimiser), (theirs, plain)):
            (sum((p * p).sum() for p in model.parameters())).backward()
            steps.step()
            steps.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)
        assert plain.state[q].keys() == optimiser.state[p].keys()
        assert all(torch.equal(plain.state[q][key], optimiser.state[p][key]) for key in plain.state[q])
        assert all(plain.state[q][key].dtype == optimiser.state[p][key].dtype for key in plain.state[q])


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
    [{"learning_rate": 0}, {"learning_rate": -1}, {"learning_rate": float("nan")}, {"eps": 0}, {"weight_decay": -0.1},
     {"clip": -1}, {"clip": float("inf")}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"optim.{next(iter(wrong))}="):
        AdamW(**wrong)
