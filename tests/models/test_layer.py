"""Hooks of layers: defaults, kinds, and names that are nearly those of a hook."""

import ast
import difflib
import importlib
import inspect
import pkgutil
import textwrap

import pytest
import torch
from torch import nn

import models
from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.cost.flops import count_flops
from models.cost.parameters import count_parameters
from models.feedforward import SwiGLU
from models.layer import HOOKS, Layer, has_hook, hook
from models.positions.rope import Rope
from trainer.optim.adamw import decayed_parameters, lr_scales

NAMES = (
    "positions_per_step",
    "multiply_adds",
    "active_share",
    "no_weight_decay",
    "weight_decay",
    "lr_scale",
    "shares_values",
    "blocks",
)


class Wrapped(nn.Module):
    """A user's layer that states nothing."""

    def __init__(self):
        super().__init__()
        self.inner = Attention(16, 4, 4, Rope())

    def forward(self, x, span):
        return self.inner(x, span)


class Taken(Wrapped):
    """A user's layer in which all of these names mean something of its own."""

    def __init__(self, kind):
        super().__init__()
        for name in NAMES:
            setattr(self, name, (lambda: 5) if kind == "method" else nn.Parameter(torch.ones(2, 2)))


def decoder(*mixers):
    return Decoder(11, 16, mixers, [SwiGLU(16, 8) for _ in mixers])


@pytest.mark.parametrize("kind", ["method", "parameter"])
def test_a_name_that_means_something_else_in_a_layer_says_nothing(kind):
    plain, taken = decoder(Wrapped()), decoder(Taken(kind))
    assert count_flops(taken) == count_flops(plain)
    assert decayed_parameters(taken) == decayed_parameters(plain) and lr_scales(taken) == {}
    own = sum(p.numel() for p in taken.parameters()) - sum(p.numel() for p in plain.parameters())
    assert count_parameters(taken).active == count_parameters(plain).active + own


def test_a_hook_of_the_right_kind_is_taken():
    layer = nn.Identity()
    layer.multiply_adds = 7
    assert hook(layer, "multiply_adds") == 7 and has_hook(layer, "multiply_adds")


@pytest.mark.parametrize("owner", [nn.Linear(2, 2), Layer(), Rope()])
def test_what_states_nothing_has_the_defaults_of_a_layer(owner):
    assert not [name for name in HOOKS if has_hook(owner, name)]
    assert hook(owner, "active_share") == 1.0 and hook(owner, "max_length") is None
    assert hook(owner, "carries_over")() is None and hook(owner, "on_step_end")({}) == {}


def our_layers():
    """All classes of models/ that derive from Layer."""
    for module in pkgutil.walk_packages(models.__path__, "models."):
        importlib.import_module(module.name)
    classes, waiting = set(), [Layer]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        classes |= {each for each in below if each.__module__.startswith("models.")}
    return sorted(classes, key=lambda each: each.__qualname__)


def public_names(layer):
    """Attributes that the body of a class or its methods assign."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(layer)))
    own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
           and isinstance(node.ctx, ast.Store)}  # fmt: skip
    return {name for name in own | set(vars(layer)) if not name.startswith("_")}


def misspelt(names):
    """{name: the hook that it resembles} of names that are none."""
    near = {name: difflib.get_close_matches(name, HOOKS, 1, 0.8) for name in names - HOOKS}
    return {name: hooks[0] for name, hooks in near.items() if hooks}


def test_no_layer_of_ours_misspells_a_hook():
    assert len(our_layers()) > 40
    found = {layer.__qualname__: misspelt(public_names(layer)) for layer in our_layers()}
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_a_misspelt_hook_is_found():
    class Wrong(Layer):
        no_weight_decays = ("bias",)

        def __init__(self):
            super().__init__()
            self.active_shares = 0.5

        def on_step_begins(self, step):
            """Never called."""

        def init_rule(self):
            """Never called."""

    assert misspelt(public_names(Wrong)) == {
        "no_weight_decays": "no_weight_decay",
        "active_shares": "active_share",
        "on_step_begins": "on_step_begin",
        "init_rule": "init_rules",
    }


def test_modules_of_models_derive_from_layer():
    """A plain nn.Module there is a primitive, a score or an inner part without hooks."""
    plain = []
    for layer in set(nn.Module.__subclasses__()):
        if layer.__module__.startswith("models.") and not issubclass(layer, Layer):
            plain += [layer.__qualname__] if HOOKS & set(vars(layer)) else []
    assert not plain
