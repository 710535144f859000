"""Which parameters weight decay acts on, name by name, for every mixer, position, memory and model
that there is a yaml of.

Numbers of layers are left out. A word is the name of a weight (`q` is q.weight); with a full stop
it is a whole name.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.optim.adamw import decayed_parameters
from trainer.optim.muon import Muon, matrices

CONF = Path(__file__).parents[2] / "conf"
SWIGLU = "feedforward.up feedforward.gate feedforward.down"
EXPERTS = (
    "feedforward.router feedforward.experts.up. feedforward.experts.gate. feedforward.experts.down."
)
PLAIN = "q k v out"
RWKV6 = "r k v g out decay.down decay.up looks.down looks.up"
RWKV7 = "r k v out decay.down decay.up rate.down rate.up gate.down gate.up pull.down pull.up"
TAPPED = "q k v out q_taps k_taps v_taps step"
INDEXER = "indexer.q indexer.weight indexer.compressor.value indexer.compressor.gate"
SET_BLOCK = ("q", "k", "v", "out", "feedforward")


def within(place, words):
    """The same words below a module."""
    return " ".join(f"{place}.{word}" for word in words)


TWO_STACKS = " ".join(
    (
        PLAIN,
        within("cross", ("q", "k", "v", "out")),
        within("encoder_blocks.mixer", ("q", "k", "v", "out")),
    )
)
GATED_STACKS = f"{TWO_STACKS} {SWIGLU} {within('encoder_blocks', SWIGLU.split())}"
UP_AND_DOWN = ("feedforward.up", "feedforward.down")
MIXERS = {
    "compressed": f"squeeze_q q kv compressor.value compressor.gate {INDEXER} group. out",
    "delta": TAPPED,
    "gated": "q k v gate out",
    "gated_delta": f"{TAPPED} gate forget",
    "gated_linear": "q k v gate forget out",
    "hyena": "inner short out",
    "latent": "q squeeze up out",
    "longformer": "q k v global_q global_k global_v out",
    "lsh": "qk v out",
    "mamba2": "inner taps out",
    "retention": "q k v gate out",
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "short_conv": "inner taps out",
}
WHOLE = {  # models that are no mixer with SwiGLU and a tied embedding
    "deep_sets": "phi rho head",
    "encoder_decoder": GATED_STACKS,
    "gat": "source target",
    "hybrid": f"{TAPPED} gate forget {SWIGLU}",
    "key_value": "hops head",
    "lstm": "cells.all out",
    "moe_topk": (
        f"{PLAIN} {SWIGLU} {EXPERTS} feedforward.shared.up feedforward.shared.gate"
        " feedforward.shared.down"
    ),
    "multimodal": f"{PLAIN} {SWIGLU} image sound",
    "ntm": "hidden aim write out",
    "retnet": f"q k v gate out {SWIGLU}",
    "rwkv7": f"{RWKV7} feedforward.up feedforward.down",
    "seq2seq": " ".join(
        (
            "attention.key bridge cells.feed cells.input cells.recurrent head readout",
            within("encoder.forwards.cell", ("input", "recurrent")),
            within("encoder.backwards.cell", ("input", "recurrent")),
        )
    ),
    "set_transformer": " ".join(
        (
            within("inward", SET_BLOCK),
            within("outward", SET_BLOCK),
            within("pool.block", SET_BLOCK),
            within("seed_blocks.block", SET_BLOCK),
            "pool.feedforward readout head",
        )
    ),
    "t5": f"{GATED_STACKS} head",
    "transformer": " ".join(
        (TWO_STACKS, *UP_AND_DOWN, within("encoder_blocks", UP_AND_DOWN)),
    ),
    "switch": f"{PLAIN} {SWIGLU} {EXPERTS}",
}


def yamls(group):
    # Neither names a layer: a hub model takes its own from a folder.
    unnamed = ("decoder", "hub")
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem not in unnamed)


CASES = [
    (group, name) for group in ("mixer", "position", "memory", "model") for name in yamls(group)
]


def expected(group, name):
    if group == "model" and name in WHOLE:
        words = WHOLE[name]
    else:
        words = f"{MIXERS.get(name, PLAIN)} {SWIGLU}"
    return {
        word.removesuffix(".") if word.endswith(".") else f"{word}.weight" for word in words.split()
    }


def bare(names):
    """Names without numbers of layers, and without the part that is most of them."""
    return {
        re.sub(r"\.\d+", "", name).removeprefix("blocks.").removeprefix("mixer.") for name in names
    }


def built(*words):
    asked = compose((*words, "wandb.mode=disabled"))
    assert asked.config is not None
    with torch.device("meta"):
        return build_model(asked.config, 256)


@pytest.mark.parametrize("group, name", CASES)
def test_these_decay_and_no_others(group, name):
    model = built(f"{group}={name}")
    assert bare(decayed_parameters(model)) == expected(group, name)


SOME = [("mixer", "rwkv7"), ("position", "relative"), ("memory", "tokens"), ("model", "moe_topk")]


@pytest.mark.parametrize("group, name", SOME)
def test_muon_gives_what_it_does_not_take_to_an_adamw_that_decays_the_same(group, name):
    model = built(f"{group}={name}")
    optimiser = Muon(weight_decay=0.3)(model, dict(model.named_parameters()))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    shrunk = {
        names[id(p)]
        for part in optimiser.param_groups
        if part["weight_decay"]
        for p in part["params"]
    }
    assert shrunk == decayed_parameters(model) and set() < matrices(model) <= shrunk


class Mine(nn.Module):
    """A user's layer: parameters of all shapes, among them names that mean something to the
    trainer."""

    def __init__(self):
        super().__init__()
        self.coefficients = nn.Parameter(torch.ones(2, 3))
        self.cube = nn.Parameter(torch.ones(2, 3, 4))
        self.lr_scale = nn.Parameter(torch.ones(2, 2))
        self.cell, self.filter = nn.GRU(3, 3), nn.Conv1d(3, 3, 2)
        self.attend = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.normed, self.table = nn.LayerNorm([2, 3]), nn.EmbeddingBag(5, 3)


def test_the_matrices_of_torchs_layers_decay_in_a_layer_of_a_user_and_nothing_else():
    matrices_of_torch = {"cell.weight_ih_l0", "cell.weight_hh_l0", "filter.weight"}
    assert decayed_parameters(Mine()) == matrices_of_torch | {
        "attend.in_proj_weight",
        "attend.out_proj.weight",
    }
