"""Matrices step by their orthogonalised momentum, the same wherever they are sharded."""

import pytest
import torch
from torch import nn

from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.mesh import build_mesh
from tests.support.pool import ranks
from tests.support.small_model import Small, on_meta, train, whole
from trainer.config.compose import compose
from trainer.optim.muon import Muon, matrices, orthogonalize
from trainer.preflight.check import check_config

HIDDEN = {f"blocks.{i}.{side}.weight" for i in (0, 1) for side in ("up", "down")}
COUNT = 6


def test_it_takes_the_hidden_matrices_alone():
    assert matrices(Small(tie=False)) == matrices(Small(tie=True)) == HIDDEN
    model = Small(tie=False)
    optimiser = Muon(weight_decay=0.3)(model, dict(model.named_parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    state = {names[id(p)]: set(kept) for p, kept in optimiser.state.items()}
    assert {name for name, kept in state.items() if kept == {"momentum_buffer"}} == HIDDEN
    assert all(
        kept == {"step", "exp_avg", "exp_avg_sq"}
        for name, kept in state.items()
        if name not in HIDDEN
    )
    assert len(state) == len(names) == sum(len(group["params"]) for group in optimiser.param_groups)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 5)])
def test_singular_vectors_stay_and_values_come_near_one(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(1e3 * matrix, 5)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.mT @ found @ right.mT
    assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all()
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-12)
    assert not orthogonalize(torch.zeros(shape), 5).any()


def test_it_steps_as_the_library_does_in_bfloat16():
    layer, same = (nn.Linear(24, 40, bias=False) for _ in range(2))
    same.load_state_dict(layer.state_dict())
    model = nn.ModuleDict({"inner": layer, "norm": nn.RMSNorm(3)})
    ours = Muon(learning_rate=0.02, weight_decay=0.1)(model, dict(model.named_parameters()))
    theirs = torch.optim.Muon(
        same.parameters(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    start = layer.weight.detach().clone()
    for step in range(4):
        layer.weight.grad = torch.randn(40, 24, generator=torch.Generator().manual_seed(step))
        same.weight.grad = layer.weight.grad.clone()
        ours.step()
        theirs.step()
    moved = (same.weight - start).norm()
    assert (
        moved > 0.1 and (layer.weight - same.weight).norm() < 0.01 * moved
    )  # theirs iterates in bfloat16


def test_adamw_takes_the_rest_at_the_rate_that_is_set():
    model = Small(tie=False)
    ours = Muon(learning_rate=0.5, weight_decay=0.1)(model, dict(model.named_parameters()))
    for group in ours.param_groups:
        group["lr"] = 0.01 * group["rate"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours.step()
    torch.testing.assert_close(
        model.norm.weight, before["norm.weight"] - 0.01
    )  # AdamW's first step is the learning rate
    assert (model.blocks[0].up.weight - before["blocks.0.up.weight"]).abs().max() < 0.01


def trained(env, kind, micro):
    engine = kind(build_mesh(1, env.size), Muon(learning_rate=0.01), precision="float64", seed=3)
    engine.wrap(on_meta())
    norms = train(engine, 0, 3, COUNT, micro)
    return (
        whole(engine),
        norms,
        {key: t.full_tensor() if kind is Fsdp else t for key, t in moments(engine).items()},
    )


def moments(engine):
    return {
        name: t
        for name, t in engine.state()["optimizer"].items()
        if name.endswith("momentum_buffer")
    }


@pytest.mark.parametrize(
    "kind, size, micro", [(Single, 2, 1), (Fsdp, 1, 1), (Fsdp, 2, 1), (Fsdp, 3, 2)]
)
def test_it_is_the_same_on_any_ranks_sharded_or_not(kind, size, micro):
    expected, norms, buffers = ranks(1, trained, Single, 1)[0]
    assert {name.removesuffix(".momentum_buffer") for name in buffers} == HIDDEN
    for parameters, found, kept in ranks(size, trained, kind, micro):
        torch.testing.assert_close(found, norms, rtol=1e-10, atol=0)
        torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(kept, buffers, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "setting", [{"momentum": 1.0}, {"momentum": -0.1}, {"iterations": 0}, {"learning_rate": 0.0}]
)
def test_a_number_out_of_its_range_is_refused(setting):
    with pytest.raises(ValueError, match=f"optim.{next(iter(setting))}"):
        Muon(**setting)


def faults(*words):
    asked = compose(("optim=muon", "wandb.mode=disabled", *words))
    assert asked.config is not None
    return check_config(asked.config, asked.given, asked.mended, asked.faults)


def test_it_is_offered_and_refused_where_matrices_are_cut_into_flat_pieces():
    assert faults("optim.momentum=0.9") == faults("engine=deepspeed", "engine.zero_stage=0") == []
    found = faults("engine=deepspeed", "engine.zero_stage=2")
    assert len(found) == 1 and all(
        word in found[0] for word in ("optim=muon", "engine.zero_stage=2", "optim=adamw")
    )
    assert any("optim.momentum" in fault for fault in faults("optim.momentum=2"))
