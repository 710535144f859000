"""Mixtures of experts against transformers: Switch with its drops and losses, Mixtral's block.
Float32, 1e-6."""

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.switch_transformers import modeling_switch_transformers as theirs
from transformers.models.switch_transformers.configuration_switch_transformers import (
    SwitchTransformersConfig,
)

from models.auxiliary import auxiliary_loss, statistics
from models.moe.switch import Switch
from models.moe.topk import TopKMixture
from models.span import Span

B, T, WIDTH, HIDDEN, EXPERTS = 3, 40, 16, 24, 5
SPAN = Span.line(B, T)


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, WIDTH, generator=generator), torch.randn(
        B, T, WIDTH, generator=generator
    )


def compared(ours, other, gradients) -> None:
    """Outputs, the input's gradient and every parameter's; `gradients()` are theirs by our names,
    after backward."""
    x, grad = given()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    have, want = ours(a, SPAN), other(b)
    torch.testing.assert_close(have, want, rtol=0, atol=1e-6)
    (have * grad).sum().backward()
    (want * grad).sum().backward()
    found = {"x": a.grad, **{name: p.grad for name, p in ours.named_parameters()}}
    wanted = {"x": b.grad, **gradients()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-6 * tensor.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 8.0])
def test_switch_transformers_sparse_mlp(factor):
    """Their capacity is a number of tokens of a sequence; ours is worked out from the factor."""
    room = -(-int(factor * T) // EXPERTS)
    config = SwitchTransformersConfig(
        d_model=WIDTH,
        d_ff=HIDDEN,
        num_experts=EXPERTS,
        expert_capacity=room,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    torch.manual_seed(1)
    other = theirs.SwitchTransformersSparseMLP(config)
    ours = Switch(
        WIDTH, HIDDEN, experts=EXPERTS, capacity_factor=factor, jitter=0.0, activation="relu"
    )
    experts = [other.experts[f"expert_{e}"] for e in range(EXPERTS)]
    stacks = {
        "experts.up": [e.wi.weight for e in experts],
        "experts.down": [e.wo.weight for e in experts],
    }
    with torch.no_grad():
        ours.router.weight.copy_(other.router.classifier.weight)
        for name, parts in stacks.items():
            ours.get_parameter(name).copy_(torch.stack(parts))

    def gradients():
        found = {name: torch.stack([p.grad for p in parts]) for name, parts in stacks.items()}
        return found | {"router.weight": other.router.classifier.weight.grad}

    compared(ours, other, gradients)
    dropped = statistics(ours)["/dropped"].item()
    assert (dropped > 0) == (factor < 8), "drops are compared too"


def test_its_losses():
    """Their load-balancing loss, too, is taken a row at a time and averaged."""
    x, _ = given()
    ours = Switch(WIDTH, HIDDEN, experts=EXPERTS, jitter=0.0, balance=1.0, z=1.0)
    torch.manual_seed(2)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    ours(x, SPAN)
    logits = ours.router(x, SPAN)
    found = auxiliary_loss(ours, tokens=B * T, rows=B)
    balance = theirs.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    torch.testing.assert_close(found["balance"], balance, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        found["router_z"], theirs.router_z_loss_func(logits), rtol=1e-6, atol=0
    )


def test_mixtral_sparse_moe_block():
    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        router_jitter_noise=0.0,
    )
    other = mixtral.MixtralSparseMoeBlock(config)
    torch.manual_seed(3)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = TopKMixture(WIDTH, HIDDEN, experts=EXPERTS, top=2, hidden=HIDDEN)
    with torch.no_grad():
        for name, value in zip(("gate", "up"), other.experts.gate_up_proj.chunk(2, 1)):
            ours.experts.get_parameter(name).copy_(value)
        ours.experts.down.copy_(other.experts.down_proj)
        ours.router.weight.copy_(other.gate.weight)

    def gradients():
        gate, up = other.experts.gate_up_proj.grad.chunk(2, 1)
        found = {
            "experts.gate": gate,
            "experts.up": up,
            "experts.down": other.experts.down_proj.grad,
        }
        return found | {"router.weight": other.gate.weight.grad}

    compared(ours, other, gradients)


def test_mixtrals_load_balancing_loss():
    """Theirs adds up the k choices of a token, ours takes their mean: k times ours is theirs, a row
    at a time."""
    x, _ = given()
    ours = TopKMixture(WIDTH, HIDDEN, experts=EXPERTS, top=2, balance=1.0)
    torch.manual_seed(4)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    ours(x, SPAN)
    logits = ours.router(x, SPAN)
    rows = [mixtral.load_balancing_loss_func((row,), EXPERTS, 2) for row in logits]
    torch.testing.assert_close(
        2 * auxiliary_loss(ours, rows=B)["balance"], torch.stack(rows).mean(), rtol=1e-6, atol=0
    )
