"""Checkpoints round-trip bit for bit on any number of ranks, and what is not whole is passed
over."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.pool import ranks
from trainer.checkpoint.manifest import MANIFEST, ravel, unravel
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.writer import CheckpointWriter
from trainer.errors import UserError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def small(value: float = 1.0) -> dict:
    return {
        "model": {"w": torch.full((3, 2), float(value))},
        "optimizer": {"lr": 0.1, "betas": (0.9, 0.95)},
    }


def alone(directory: Path, **settings) -> CheckpointWriter:
    return CheckpointWriter(directory, say=settings.pop("say", lambda text: None), **settings)


def training(size: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module of uneven sizes, sharded by FSDP2 over `size` ranks (0: not at all), after one step
    of AdamW."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    if size:
        mesh = init_device_mesh("cpu", (size,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.97))
    model(torch.arange(10.0).view(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def whole(value):
    """The same nested value with plain, full tensors."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value


def same(one, other) -> bool:
    """Equal to the bit, in structure and in kind."""
    tensors, tree = unravel(one)
    others, other_tree = unravel(other)
    return tree == other_tree and all(torch.equal(tensors[path], others[path]) for path in tensors)


def write(env, directory: str, sharded: bool, asynchronous: bool):
    model, optimizer = training(env.size if sharded else 0, seed=3)
    checkpoints = CheckpointWriter(directory, group=env.group, asynchronous=asynchronous)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    checkpoints.save(7, states, {"cursor": {"row": 5}, "rate": 0.1})
    checkpoints.close()
    return whole(states)


def read(env, directory: str, sharded: bool):
    model, optimizer = training(env.size if sharded and env else 0, seed=4)
    archive = CheckpointReader(directory, group=env and env.group)
    latest = archive.latest()
    assert latest is not None
    saved = archive.load(
        latest, dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    )
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved.state["model"],
        optim_state_dict=saved.state["optimizer"],
    )
    archive.close()
    return (
        whole(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))),
        saved.step,
        saved.extra,
    )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_two_ranks_save_any_number_of_ranks_load(tmp_path, asynchronous):
    truth = ranks(2, write, str(tmp_path), True, asynchronous)[0]
    answers = [read(None, str(tmp_path), False)]  # one process without torch.distributed
    for size, sharded in ((3, True), (2, True), (2, False)):
        answers += ranks(size, read, str(tmp_path), sharded)
    for state, step, extra in answers:
        assert same(state, truth)
        assert (step, extra) == (7, {"cursor": {"row": 5}, "rate": 0.1})


def test_what_plain_ranks_save_sharded_ranks_load(tmp_path):
    truth = ranks(3, write, str(tmp_path), False, False)[0]
    assert same(ranks(2, read, str(tmp_path), True)[1][0], truth)


def test_every_dtype_and_shape_comes_back_to_the_bit(tmp_path):
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-40, 3.0])
    state = {"model": {str(dtype): values.nan_to_num().to(dtype) for dtype in DTYPES}}
    state["model"] |= {
        "nan": values,
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 3),
        "view": torch.eye(4).T[1:, ::2],
    }
    state["model"]["odd"] = torch.arange(3, dtype=torch.uint8)
    checkpoints = alone(tmp_path)
    checkpoints.save(1, state, {})
    blank = {"model": {key: torch.full_like(tensor, 9) for key, tensor in state["model"].items()}}
    loaded = checkpoints.load(tmp_path / "step_00000001", blank).state["model"]
    for key, tensor in state["model"].items():
        assert loaded[key].dtype == tensor.dtype
        assert (
            loaded[key].reshape(-1).view(torch.uint8).tolist()
            == tensor.reshape(-1).view(torch.uint8).tolist()
        ), key


def test_plain_values_keep_their_kinds(tmp_path):
    plain = {
        "a": (1, 2.5, None),
        "b": [True, "x", {}],
        "c": float("inf"),
        "d": 0.1 + 0.2,
        "e": 2**70,
    }
    checkpoints = alone(tmp_path)
    checkpoints.save(1, {"optimizer": plain}, {})
    assert (
        checkpoints.load(tmp_path / "step_00000001", {"optimizer": {}}).state["optimizer"] == plain
    )
    tensors, tree = unravel(plain)
    assert ravel(json.loads(json.dumps(tree)), tensors) == plain


def test_a_shard_is_a_safetensors_file(tmp_path):
    alone(tmp_path).save(1, small(2.0), {})
    loaded = load_file(tmp_path / "step_00000001" / "shard_00000.safetensors")
    assert torch.equal(loaded["model/w"], torch.full((3, 2), 2.0))


def test_only_the_last_few_are_kept(tmp_path):
    checkpoints = alone(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, small(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    with pytest.raises(ValueError, match="keep"):
        alone(tmp_path, keep=0)


def test_a_step_saved_again_replaces_the_old_and_later_ones_can_be_forgotten(tmp_path):
    checkpoints = alone(tmp_path, keep=None)
    for step in (1, 2, 3):
        checkpoints.save(step, small(step), {})
    checkpoints.forget_after(2)
    checkpoints.save(2, small(20), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    assert checkpoints.load(tmp_path / "step_00000002", small()).state["model"]["w"][0, 0] == 20


def test_a_checkpoint_in_the_background_holds_the_moment_of_the_call(tmp_path):
    checkpoints = alone(tmp_path, asynchronous=True)
    state = small(1.0)
    checkpoints.save(1, state, {})
    state["model"]["w"].fill_(5.0)
    checkpoints.save(2, state, {})  # waits for the first: never two at once
    state["model"]["w"].fill_(6.0)
    assert checkpoints.finish() == 2
    assert checkpoints.poll() is None
    for step, value in ((1, 1.0), (2, 5.0)):
        assert (
            checkpoints.load(tmp_path / f"step_{step:08d}", small(0))
            .state["model"]["w"]
            .eq(value)
            .all()
        )


def poll(env, directory: str):
    checkpoints = CheckpointWriter(directory, group=env.group, asynchronous=True)
    checkpoints.save(1, small(), {})
    polls = 1
    while (step := checkpoints.poll()) is None:
        polls += 1
    checkpoints.close()
    return step, polls, (Path(directory) / "step_00000001" / MANIFEST).is_file()


def test_all_ranks_hear_of_a_checkpoint_at_the_same_poll(tmp_path):
    one, two, three = ranks(3, poll, str(tmp_path))
    assert one == two == three
    assert one[0] == 1 and one[2]


def spoil(place: Path, how: str) -> None:
    shard, manifest = place / "shard_00000.safetensors", place / MANIFEST
    if how == "bit":
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    if how == "gone":
        shard.unlink()
    if how == "no manifest":
        manifest.unlink()
    if how == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    if how == "another step":
        manifest.write_text(manifest.read_text().replace('"step":2', '"step":9'))


@pytest.mark.parametrize(
    "how", ["bit", "cut", "gone", "no manifest", "half a manifest", "another step"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, how):
    said = []
    checkpoints = alone(tmp_path, say=said.append)
    checkpoints.save(1, small(1), {})
    checkpoints.save(2, small(2), {})
    spoil(tmp_path / "step_00000002", how)
    reader = CheckpointReader(tmp_path, say=said.append)
    with pytest.raises(UserError, match="cannot resume from"):
        reader.load(tmp_path / "step_00000002", small())
    assert reader.latest() == tmp_path / "step_00000001"
    assert checkpoints.latest() == tmp_path / "step_00000001"
    assert len(said) == 2 and all("step_00000002 is damaged" in text for text in said)
    assert [path.name[:15] for path in sorted(tmp_path.iterdir())] == [
        "broken_00000002",
        "step_00000001",
    ]
    spoil(tmp_path / "step_00000001", how if how != "another step" else "bit")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        checkpoints.latest()


def test_what_a_killed_run_left_is_removed_or_put_back(tmp_path):
    alone(tmp_path).save(1, small(1), {})
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000005.tmp-00ff")
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000001.gone-00ff")
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.old-00ff")
    assert alone(tmp_path).latest() == tmp_path / "step_00000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert CheckpointReader(tmp_path / "nowhere").latest() is None


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"model": {"w": torch.zeros(3, 2), "b": torch.zeros(1)}}, "it has no model/b"),
        ({"model": {}}, "it has model/w, which this model has not"),
        ({"model": {"w": torch.zeros(2, 3)}}, r"model/w is \[3, 2\] there and \[2, 3\] here"),
        (
            {"model": {"w": torch.zeros(3, 2, dtype=torch.float64)}},
            "model/w is F32 there and F64 here",
        ),
        ({"memory": {}}, "it holds model, optimizer and no memory"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, wanted, told):
    alone(tmp_path).save(1, small(), {})
    with pytest.raises(UserError, match=told):
        CheckpointReader(tmp_path).load(tmp_path / "step_00000001", wanted)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"model": {"w": object()}}, "model/w is a object"),
        ({"model": {3: 1}}, "keys are texts"),
        ({"model": {"w": torch.zeros(1, dtype=torch.complex64)}}, "model/w of torch.complex64"),
        (
            {"model": {"a/b": torch.zeros(1), "a": {"b": torch.zeros(1)}}},
            "share the path model/a/b",
        ),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path, state, told):
    with pytest.raises(ValueError, match=told):
        alone(tmp_path).save(1, state, {})
