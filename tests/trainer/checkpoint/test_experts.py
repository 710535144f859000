"""A checkpoint goes on with another number of expert ranks, another engine, more or fewer replicas:
the same losses."""

import functools

import pytest
import torch

from parallel.mesh import Mesh
from tests.support.pool import ranks
from tests.support.small_mixture import engine_here, engine_on, everything, train
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.writer import CheckpointWriter

BEFORE, AFTER = range(2), range(2, 4)

# name, shape of the mesh; None = one process without torch.distributed
ALONE = ("single", None)
FOUR = ("fsdp", {"context": 1, "data": 4, "experts": 4})
FOUR_WHOLE = ("single", {"context": 2, "data": 2, "experts": 4})
TWO_CUT = ("fsdp", {"context": 2, "data": 2, "experts": 2})
TWO_WHOLE = ("single", {"context": 1, "data": 2, "experts": 2})
TWICE = ("fsdp", {"context": 1, "data": 4, "experts": 2, "replicas": 2})
NONE = ("fsdp", {"context": 2, "data": 1})


@functools.cache
def alone():
    """(losses and norms of the steps to come, the state before them) of one process."""
    engine = engine_on(Mesh.alone(), "single")
    train(engine, BEFORE)
    before = everything(engine)
    return train(engine, AFTER)[:2], before


def begin(place, seed):
    name, shape = place
    return (
        engine_on(Mesh.alone(), name, seed=seed)
        if shape is None
        else engine_here(name, shape, seed=seed)
    )


def write(env, place, path):
    engine = begin(place, 5)
    train(engine, BEFORE)
    checkpoints = CheckpointWriter(path, group=env and env.group)
    checkpoints.save(2, engine.state(), {})
    checkpoints.close()
    return everything(engine)


def resume(env, place, path):
    engine = begin(place, 6)
    train(engine, range(7, 8))  # somewhere else, so that loading has something to do
    archive = CheckpointReader(path, group=env and env.group)
    engine.load(archive.load(archive.latest(), engine.state()).state)
    archive.close()
    return everything(engine), train(engine, AFTER)[:2]


def on(place, worker, path):
    shape = place[1]
    return (
        [worker(None, place, path)]
        if shape is None
        else ranks(shape["context"] * shape["data"], worker, place, path)
    )


WAYS = [
    (FOUR, TWO_WHOLE),
    (FOUR, ALONE),
    (FOUR, TWO_CUT),
    (TWO_CUT, FOUR),
    (TWO_CUT, NONE),
    (TWO_WHOLE, FOUR_WHOLE),
    (FOUR_WHOLE, TWO_CUT),
    (ALONE, FOUR),
    (ALONE, TWO_CUT),
    (NONE, TWICE),
    (TWICE, TWO_CUT),
    (TWICE, ALONE),
]


# From sharded experts to none, to sharded ones from whole ones, and from one device.
FIRST = (4, 5, 7)


@pytest.mark.parametrize(
    "place, then",
    [
        way if number in FIRST else pytest.param(*way, marks=pytest.mark.full)
        for number, way in enumerate(WAYS)
    ],
)
def test_a_checkpoint_goes_on_where_experts_lie_otherwise(place, then, tmp_path):
    (losses, norms), truth = alone()
    for before in on(place, write, str(tmp_path)):
        for part, tensors in truth.items():
            assert tensors.keys() == before[part].keys()
    for after, found in on(then, resume, str(tmp_path)):
        for part, tensors in before.items():
            assert tensors.keys() == after[part].keys()
            assert all(torch.equal(after[part][name], tensor) for name, tensor in tensors.items())
        torch.testing.assert_close(found, (losses, norms), rtol=1e-10, atol=0)


@pytest.mark.short("place2")
@pytest.mark.parametrize("place", [FOUR_WHOLE, TWO_CUT, TWICE])
def test_each_expert_is_written_once(place, tmp_path):
    """However many ranks hold it: the parts of a tensor in the manifest do not overlap and are as
    large as the tensor."""
    on(place, write, str(tmp_path))
    for path, tensor in read_manifest(tmp_path / "step_00000002")["tensors"].items():
        total = sum(torch.Size(chunk["sizes"]).numel() for chunk in tensor["chunks"])
        assert total == torch.Size(tensor["size"]).numel(), path
        corners = [tuple(chunk["offsets"]) for chunk in tensor["chunks"] if 0 not in chunk["sizes"]]
        assert len(set(corners)) == len(corners), path
