"""A block of one token a row, written out in one function, is what its modules compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.attention.sliding import Sliding
from models.cache import fused_step
from models.carried_state import name_stateful_modules
from models.feedforward import SwiGLU
from models.init import initialise
from models.norms import RMSNorm
from models.positions.alibi import Alibi
from models.positions.rope import Rope
from models.positions.yarn import Yarn
from trainer.decoding.token_decoder import TokenDecoder

WIDTH = 24
PROMPTS = [[3, 5, 7, 1, 2, 9], [4], [8, 8, 1]]
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: Attention(WIDTH, 6, 2, Rope()),
    "biases": lambda: Attention(WIDTH, 6, 3, Yarn(4, 16), bias=True, out_bias=True),
    "part_rotated": lambda: Attention(WIDTH, 2, 2, Rope(rotated_share=0.5)),
    "bias_of_score": lambda: Attention(WIDTH, 4, 2, Alibi()),
    "window": lambda: Sliding(WIDTH, 4, 2, Rope(), window=3),
}


def made(name: str) -> Any:
    mixers = [MIXERS[name]() for _ in range(2)]
    model = Decoder(11, WIDTH, mixers, [SwiGLU(WIDTH, 20) for _ in mixers])
    name_stateful_modules(model)
    return initialise(model, seed=1).double().eval()


def logits_of_steps(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    decoder = TokenDecoder(model)
    found = [decoder.feed(prompts)]
    for step in range(5):
        # Row 1 rests in one step: its state must stay.
        found.append(decoder.feed([[step], [] if step == 2 else [step + 1], [9]]))
    return torch.stack(found)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_it_is_what_the_modules_compute(name, large, monkeypatch):
    model = made(name)
    fused = []

    def watched(*arguments):
        fused.append(fused_step.step(*arguments))
        return fused[-1]

    monkeypatch.setattr("models.block.step", watched)
    if large:  # as weights of more bytes are: apart, and rows as columns
        monkeypatch.setattr(fused_step, "LARGE", 0)
    steps = logits_of_steps(model, PROMPTS)
    # Two layers in five steps, none of which ran as it is.
    assert len(fused) == 10
    assert all(each is not None for each in fused)
    handles = [block.mixer.register_forward_hook(lambda *_: None) for block in model.blocks]
    fused.clear()
    plain = logits_of_steps(model, PROMPTS)
    assert fused == [None] * 10
    for handle in handles:
        handle.remove()
    assert (steps - plain).abs().max() < 1e-13 * plain.abs().max()


def test_rows_of_equal_length_share_a_mask_of_nothing():
    model = made("grouped")
    prompts = [[3, 5, 7], [1, 1, 2], [6, 0, 4]]
    steps = logits_of_steps(model, prompts)
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda *_: None)
    assert (steps - logits_of_steps(model, prompts)).abs().max() < 1e-13 * steps.abs().max()


def test_a_part_that_is_another_class_runs_as_it_is():
    model = made("grouped")
    block = model.blocks[0]
    assert fused_step._known(block) is not None

    class Doubled(nn.Linear):
        """A layer of somebody's own."""

        def forward(self, x):
            return 2 * super().forward(x)

    block.mixer.q = Doubled(WIDTH, WIDTH, bias=False)
    assert fused_step._known(block) is None


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_the_short_norm_is_the_norm(eps):
    norm = RMSNorm(WIDTH, eps=eps).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 1, WIDTH, dtype=torch.float64)
    long = nn.RMSNorm.forward(norm, x)
    with torch.no_grad():
        assert (norm(x) - long).abs().max() < 1e-14
        assert (norm(0 * x) == 0).all()


def test_training_goes_on_after_a_text():
    """What was computed in inference mode must not be needed for a gradient."""
    model = made("grouped")
    logits_of_steps(model, PROMPTS)
    model(torch.tensor([[3, 5, 7]])).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
