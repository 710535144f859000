"""Initial weights depend on the seed and the parameter's name, and on nothing else."""

import torch
from torch import nn

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.feedforward import SwiGLU
from models.init import INIT_STD, constant, initial_tensor, initialise
from models.positions.rope import Rope


def decoder(layers=2):
    return Decoder(
        17,
        16,
        [Attention(16, 4, 2, Rope()) for _ in range(layers)],
        [SwiGLU(16, 24) for _ in range(layers)],
    )


def test_the_same_seed_and_name_give_the_same_weights_whatever_came_before():
    a = initialise(decoder(), 3).state_dict()
    torch.manual_seed(99)
    torch.rand(5)
    b = initialise(decoder(), 3).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    longer = initialise(decoder(3), 3).state_dict()
    assert torch.equal(a["blocks.0.mixer.q.weight"], longer["blocks.0.mixer.q.weight"])


def test_another_seed_or_name_gives_other_weights():
    a, b = initialise(decoder(), 3).state_dict(), initialise(decoder(), 4).state_dict()
    assert not torch.equal(a["embed.weight"], b["embed.weight"])
    assert not torch.equal(a["blocks.0.mixer.q.weight"], a["blocks.1.mixer.q.weight"])


def test_a_model_on_the_meta_device_gives_the_same_tensor():
    whole = initialise(decoder(), 3)
    with torch.device("meta"):
        empty = decoder()
    for name, parameter in whole.named_parameters():
        assert torch.equal(initial_tensor(empty, name, 3), parameter)


def test_outputs_start_smaller_the_deeper_the_model():
    wide = Decoder(
        17,
        256,
        [Attention(256, 4, 4, Rope()) for _ in range(8)],
        [SwiGLU(256, 512) for _ in range(8)],
    )
    initialise(wide, 0)
    assert abs(wide.blocks[0].mixer.q.weight.std().item() / INIT_STD - 1) < 0.02
    for output in (wide.blocks[3].mixer.out, wide.blocks[3].feedforward.down):
        assert abs(output.weight.std().item() / (INIT_STD / 4) - 1) < 0.02


def test_norms_start_at_one_and_biases_at_zero():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.RMSNorm(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    initialise(model, 0)
    assert (model[1].weight == 1).all() and (model[2].weight == 1).all()
    assert (model[0].bias == 0).all() and (model[1].bias == 0).all()


def test_the_outer_module_has_the_last_word():
    class Inner(nn.Linear):
        def init_rules(self):
            return {"weight": constant(1.0)}

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = Inner(2, 2), Inner(2, 2)

        def init_rules(self):
            return {"inner.weight": constant(5.0)}

    model = initialise(Outer(), 0)
    assert (model.inner.weight == 5).all() and (model.other.weight == 1).all()


def test_a_models_deviation_is_that_of_every_matrix_without_a_rule_of_its_own():
    usual = initialise(decoder(), 0).state_dict()
    parts = [Attention(16, 4, 2, Rope()) for _ in range(2)], [SwiGLU(16, 24) for _ in range(2)]
    wide = initialise(Decoder(17, 16, *parts, init_std=5 * INIT_STD), 0).state_dict()
    for name, weight in usual.items():
        torch.testing.assert_close(wide[name], weight * 5 if weight.dim() > 1 else weight, msg=name)
