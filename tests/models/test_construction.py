"""A user's layer keeps the values that its constructor gave it; torch's layers keep our rules
unless it changed them."""

import pytest
import torch
from torch import nn

from models.construction import never_filled
from parallel.engines.deepspeed import Deepspeed
from parallel.engines.fsdp import Fsdp
from parallel.engines.materialize import materialize
from parallel.engines.single import Single
from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.optim.adamw import AdamW
from trainer.preflight.check_engine import check_deepspeed_model
from trainer.started_from import weight_lines

HERE = "tests.models.test_construction"
SIZES = (
    "model.width=8",
    "model.heads=2",
    "model.layers=3",
    "model.ffn=12",
    "wandb.mode=disabled",
    "model.vocabulary=11",
)
BUILT: list[int] = []  # bytes of the parameters of every layer that was built on the CPU


class Cosine(nn.Module):
    """Values of every kind that a user may give: by argument, drawn, by a buffer, by an attribute,
    in torch's layers."""

    def __init__(self, width: int, temperature: float = 1.0, flat: bool = False):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((1,) if flat else (), float(temperature)))
        self.scale, self.matrix = (
            nn.Parameter(torch.ones(width)),
            nn.Parameter(3 * torch.eye(width)),
        )
        self.drawn = nn.Parameter(torch.rand(width, width) + 5)
        self.q, self.k, self.out = (nn.Linear(width, width) for _ in range(3))
        nn.init.zeros_(self.out.weight)
        self.k.weight.data.mul_(0.5)
        self.bend, self.table = nn.PReLU(), nn.Embedding(5, width, padding_idx=2)
        self.register_buffer("window", torch.linspace(1, 2, width))
        self.slopes, self.more = torch.arange(3.0), [torch.arange(2), {"a": torch.ones(1)}]
        if not self.q.weight.is_meta:
            BUILT.append(sum(p.numel() for p in self.parameters()))

    def forward(self, x, span):
        return self.out(self.q(x) * self.temperature + self.slopes.sum()) * self.scale


class Empty(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.never = nn.Parameter(torch.empty(width))

    def forward(self, x, span):
        return x * self.never


def built(*words):
    asked = compose((*words, *SIZES))
    assert asked.config is not None, asked.faults
    with torch.device("meta"):
        return build_model(asked.config, 11)


def made(*words, seed=3):
    """The model with its values, and what each starts from."""
    model, how = built(*words), {}
    materialize(model, torch.device("cpu"), seed, how)
    return model, how


def test_what_a_layer_creates_itself_keeps_the_value_of_its_constructor():
    model, how = made(f"mixer._target_={HERE}.Cosine", "mixer.temperature=100")
    layer = model.blocks[1].mixer
    assert (
        layer.temperature.item() == 100
        and (layer.scale == 1).all()
        and torch.equal(layer.matrix, 3 * torch.eye(8))
    )
    assert torch.equal(layer.window, torch.linspace(1, 2, 8)) and torch.equal(
        layer.slopes, torch.arange(3.0)
    )
    assert layer.more[0].tolist() == [0, 1] and layer.more[1]["a"].tolist() == [1]
    assert layer.bend.weight.item() == 0.25
    assert (layer.drawn >= 5).all() and not torch.equal(layer.drawn, model.blocks[0].mixer.drawn)
    assert how["blocks.1.mixer.temperature"] == how["blocks.1.mixer.drawn"] == "as constructed"


def test_torchs_layers_keep_our_rules_unless_the_constructor_changed_them():
    model, how = made(f"mixer._target_={HERE}.Cosine")
    plain, _ = made("mixer=full")
    layer = model.blocks[0].mixer
    assert (
        torch.equal(layer.q.weight, plain.blocks[0].mixer.q.weight)
        and how["blocks.0.mixer.q.weight"] == "normal(0.02)"
    )
    assert not layer.q.bias.any() and not layer.out.weight.any()
    assert 0.05 < layer.k.weight.abs().max() < 0.5 * 8**-0.5 + 1e-6  # half of torch's draw
    assert not layer.table.weight[2].any() and layer.table.weight[1].any()


def test_a_draw_is_a_function_of_the_seed_and_the_part_and_disturbs_no_other():
    torch.manual_seed(1)
    first, _ = made(f"mixer._target_={HERE}.Cosine")
    before = torch.rand(3)
    torch.manual_seed(1)
    built(f"mixer._target_={HERE}.Cosine")
    again, _ = made(f"mixer._target_={HERE}.Cosine")
    other, _ = made(f"mixer._target_={HERE}.Cosine", seed=4)
    assert torch.equal(before, torch.rand(3))
    assert torch.equal(first.blocks[2].mixer.drawn, again.blocks[2].mixer.drawn)
    assert not torch.equal(first.blocks[2].mixer.drawn, other.blocks[2].mixer.drawn)


def test_it_is_built_block_by_block():
    BUILT.clear()
    made(f"mixer._target_={HERE}.Cosine")
    assert len(BUILT) == 3


def test_what_nobody_fills_is_refused():
    with pytest.raises(ValueError, match=r"blocks.0.mixer.never: .*torch.empty"):
        made(f"mixer._target_={HERE}.Empty")


def test_the_check_says_so_before_any_rank_starts():
    reasons = list(never_filled(built(f"mixer._target_={HERE}.Empty"), 0))
    assert [reason.partition(":")[0] for reason in reasons] == [
        f"blocks.{i}.mixer.never" for i in range(3)
    ]
    assert not list(never_filled(built(f"mixer._target_={HERE}.Cosine"), 0))


def test_a_parameter_without_dims_is_refused_where_deepspeed_cannot_hold_it():
    asked = compose((f"mixer._target_={HERE}.Cosine", "engine=deepspeed", *SIZES))
    assert asked.config is not None
    reasons = [
        finding.fact + finding.remedy
        for finding in check_deepspeed_model(asked.config, built(f"mixer._target_={HERE}.Cosine"))
        if "dims" in finding.fact
    ]
    assert (
        len(reasons) == 3
        and "blocks.0.mixer.temperature" in reasons[0]
        and "engine=fsdp" in reasons[0]
    )


def test_one_line_a_layer_says_what_was_drawn_how():
    _, how = made(f"mixer._target_={HERE}.Cosine")
    lines = list(weight_lines(how))
    (line,) = [line for line in lines if line.startswith("weights: blocks.")]
    assert (
        line.startswith("weights: blocks.0-2: ")
        and "as constructed mixer.temperature, mixer.scale" in line
    )
    assert (
        "normal(0.02) mixer.q" in line
        and "1 mixer_norm" in line
        and "as constructed (buffer) mixer.window" in line
    )
    assert "weights: embed: normal(0.02) weight" in lines


def test_every_parameter_of_ours_has_a_rule():
    for words in (
        ("position=relative",),
        ("position=t5", "mixer=sink_logit"),
        ("model=moe_topk",),
        ("mixer=compressed",),
    ):
        _, how = made(*words)
        assert not [name for name, text in how.items() if "constructed" in text]


def placed(env, kind, settings):
    engine = kind(build_mesh(1, env.size), AdamW(), seed=3, **settings)
    flat = kind is Deepspeed  # which has no parameters without dims
    engine.wrap(
        built(f"mixer._target_={HERE}.Cosine", "mixer.temperature=100", f"mixer.flat={flat}")
    )
    state = engine.state()["model"]
    return {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
        for name, t in state.items()
    }, engine.drawn


@pytest.mark.parametrize(
    "kind, settings",
    [(Single, {}), (Fsdp, {}), (Deepspeed, {"zero_stage": 1}), (Deepspeed, {"zero_stage": 3})],
)
def test_every_engine_starts_from_the_same_values(kind, settings):
    engine = Single(Mesh.alone(), AdamW(), seed=3)
    engine.wrap(built(f"mixer._target_={HERE}.Cosine", "mixer.temperature=100"))
    expected = engine.state()["model"]
    for state, drawn in ranks(2, placed, kind, settings):
        assert state.keys() == expected.keys() and (kind is Deepspeed or drawn == engine.drawn)
        for name, tensor in state.items():
            assert torch.equal(tensor.view_as(expected[name]), expected[name]), name
