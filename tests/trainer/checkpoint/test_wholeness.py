"""A manifest that is well formed but not whole is no checkpoint, and no field of the saved state is
believed unseen."""

import copy
import json
from pathlib import Path

import pytest
import torch

from tests.trainer.verify.test_killed import words
from trainer import run_dir
from trainer.checkpoint.manifest import MANIFEST, digest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.wholeness import tiles
from trainer.checkpoint.writer import CheckpointWriter
from trainer.data.cursors import misfit
from trainer.data.lanes import Lanes
from trainer.errors import UserError
from trainer.export import export
from trainer.preflight import prepare
from trainer.progress import Progress, progress_of

STEP = "step_00000003"
STATE = {
    "model": {"w": torch.arange(24.0).view(4, 6), "b": torch.zeros(3)},
    "optimizer": {"rate": 0.5},
}


@pytest.fixture
def saved(tmp_path) -> Path:
    checkpoints = CheckpointWriter(tmp_path, say=lambda text: None)
    checkpoints.save(3, STATE, {"step": 3})
    checkpoints.close()
    return tmp_path / STEP


def rewrite(place: Path, change) -> None:
    """Change a manifest as somebody would who knows how it is summed."""
    manifest = json.loads((place / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = digest(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest))


def chunk(manifest, name: str = "model/w"):
    return manifest["tensors"][name]["chunks"][0]


def halves(manifest, second: int):
    """Cut the chunk of `w` into rows 0, 1 and rows from `second` on."""
    one = chunk(manifest)
    two = copy.deepcopy(one)
    one.update(sizes=[2, 6], bytes=48)
    two.update(sizes=[2, 6], bytes=48, offsets=[second, 0], start=one["start"] + 48)
    manifest["tensors"]["model/w"]["chunks"] = [one, two]


SPOILED = {
    "no chunks": lambda m: m["tensors"]["model/w"].update(chunks=[]),
    "half of it": lambda m: chunk(m).update(sizes=[2, 6], bytes=48),
    "overlapping chunks": lambda m: halves(m, 1),
    "the same chunk twice": lambda m: m["tensors"]["model/w"]["chunks"].append(chunk(m)),
    "a chunk beyond the tensor": lambda m: chunk(m).update(offsets=[1, 0]),
    "a chunk before the tensor": lambda m: chunk(m).update(offsets=[-1, 0]),
    "a chunk of other dimensions": lambda m: chunk(m).update(offsets=[0], sizes=[24]),
    "another size": lambda m: m["tensors"]["model/w"].update(size=[8, 6]),
    "a size that no machine has": (
        lambda m: m["tensors"]["model/w"].update(size=[2**40, 2**40], chunks=[])
    ),
    "a fractional size": lambda m: m["tensors"]["model/w"].update(size=[4.0, 6]),
    "true for one": lambda m: chunk(m, "model/b").update(offsets=[False]),
    "bytes of another tensor": lambda m: chunk(m, "model/b").update(start=chunk(m)["start"]),
    "an unaligned start": (
        lambda m: chunk(m, "model/b").update(start=chunk(m, "model/b")["start"] - 2)
    ),
    "an unknown type": lambda m: m["tensors"]["model/w"].update(dtype="F7"),
    "a negative step": lambda m: m.update(step=-5),
    "another step than its folder": lambda m: m.update(step=7),
    "a step that is true": lambda m: m.update(step=True),
    "a step without end": lambda m: m.update(step=10**400),
    "a tensor that stands nowhere": lambda m: m["state"]["model"].pop("b"),
    "a tensor in the place of another": (
        lambda m: m["state"]["model"].update(b={"$tensor": "model/w"})
    ),
    "an unknown tensor": lambda m: m["state"]["model"].update(c={"$tensor": "model/c"}),
    "no state": lambda m: m.update(state=[]),
    "an extra that is a list": lambda m: m.update(extra=[1]),
    "a file without a sum": lambda m: m["files"]["shard_00000.safetensors"].update(sha256=None),
    "a file of other size": lambda m: m["files"]["shard_00000.safetensors"].update(bytes=8),
    "an entry more": lambda m: m.update(more=1),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_well_formed_but_not_whole_is_not_taken(saved, how):
    rewrite(saved, SPOILED[how])
    state = {"model": {"w": torch.full((4, 6), -1.0), "b": torch.full((3,), -1.0)}}
    archive = CheckpointReader(saved.parent, say=lambda text: None)
    with pytest.raises(UserError, match="cannot resume from"):
        archive.load(saved, state)
    with pytest.raises(UserError, match="cannot resume from"):
        archive.blank(saved, "model")
    with pytest.raises(UserError, match="is whole"):
        archive.latest()
    assert all(tensor.eq(-1).all() for tensor in state["model"].values()), "nothing was read"


def test_what_is_cut_otherwise_but_whole_is_taken(saved):
    rewrite(saved, lambda m: halves(m, 2))
    state = {"model": {"w": torch.zeros(4, 6), "b": torch.ones(3)}}
    assert torch.equal(
        CheckpointReader(saved.parent).load(saved, state).state["model"]["w"], STATE["model"]["w"]
    )


def test_a_manifest_nested_too_deeply_is_one_message(saved):
    (saved / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(UserError, match="deep"):
        CheckpointReader(saved.parent).load(saved, {"model": {}})


def test_boxes_tile_a_tensor_exactly_or_not():
    assert tiles([], [([], [])]) and not tiles([], []) and not tiles([], [([], []), ([], [])])
    assert tiles([0, 3], []) and tiles([4], [([0], [4]), ([4], [0])])
    pinwheel = [
        ([0, 0], [1, 2]),
        ([0, 2], [2, 1]),
        ([2, 1], [1, 2]),
        ([1, 0], [2, 1]),
        ([1, 1], [1, 1]),
    ]
    assert tiles([3, 3], pinwheel) and not tiles([3, 3], pinwheel[:-1])
    assert not tiles([4, 2], [([0, 0], [2, 2]), ([0, 0], [2, 2])]), "the volume alone would do"


def test_a_step_that_no_run_has_deletes_nothing(saved):
    checkpoints = CheckpointWriter(saved.parent, say=lambda text: None)
    with pytest.raises(ValueError, match="nothing is deleted"):
        checkpoints.forget_after(-5)
    assert saved.is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {"step": -5},
        {"step": 4},
        {"step": 3.0},
        {"tokens": -1},
        {"tokens": "many"},
        {"tokens": 2**70},
        {"wandb_id": "../../x"},
        {"wandb_id": 5},
        {"best": {"held_out_loss": "low"}},
        {"best": {"held_out_loss": float("nan")}},
        {"skipped": -1},
        {"norms": [1.0, -2.0]},
        {"norms": [1.0] * 1000},
        {"norms": [float("inf")]},
        {"cursor": []},
        {"more": 1},
    ],
)
def test_every_field_of_the_saved_state_has_a_type_and_a_range(change, tmp_path):
    good = Progress(
        {"rows": 0}, step=3, tokens=10, best={"held_out_loss": 2.0}, norms=[1.0]
    ).extra()
    assert progress_of(json.loads(json.dumps(good)), 3, tmp_path) == Progress(**good)
    with pytest.raises(UserError, match="cannot resume from"):
        progress_of(good | change, 3, tmp_path)


def test_a_best_value_that_is_no_number_is_not_saved(tmp_path):
    extra = Progress({}, best={"held_out_loss": float("nan"), "accuracy": 0.5}).extra()
    assert progress_of(extra, 0, tmp_path).best == {"accuracy": 0.5}


BEGINNING = {
    "rows": 0,
    "lanes": [[0, 0], [0, 0]],
    "reader": {"epoch": 0, "state": None},
    "fingerprint": "x",
}


@pytest.mark.parametrize(
    "cursor",
    [
        BEGINNING | {"rows": -2},
        BEGINNING | {"rows": 2**63},
        BEGINNING | {"rows": 1.5},
        BEGINNING | {"rows": True},
        BEGINNING | {"lanes": [[0, 0]]},
        BEGINNING | {"lanes": [[0, 0], [0]]},
        BEGINNING | {"lanes": [[0, -1], [0, 0]]},
        BEGINNING | {"lanes": "ab"},
        BEGINNING | {"reader": {"epoch": 0}},
        BEGINNING | {"reader": {"epoch": 0, "state": {"shard": 10**30}}},
        {"rows": 0, "fingerprint": "x"},
        [],
    ],
)
def test_a_cursor_of_another_kind_is_named(cursor):
    fine = BEGINNING | {
        "rows": 6,
        "lanes": [[3, 7], [2, 0]],
        "reader": {"epoch": 1, "state": {"shard": 1, "at": [None]}},
    }
    assert misfit(BEGINNING, fine) is None
    assert misfit(BEGINNING, cursor)


def test_a_memory_of_other_rows_or_kinds_is_named():
    lanes = Lanes.__new__(Lanes)
    lanes.rows = 3
    span = torch.zeros(3, 4, dtype=torch.int64)
    fine = {
        "4": {"pos": span, "doc": span, "a": torch.zeros(3, 4, 2)},
        "dealt": {"b": torch.zeros(3, 2)},
        "whole": {"c": span[:, 0]},
    }
    assert lanes.misfit(fine) is None
    for kind, name, tensor in (
        ("4", "a", torch.zeros(3, 5, 2)),
        ("4", "pos", torch.zeros(3, 4)),
        ("4", "a", torch.zeros(2, 4, 2)),
        ("dealt", "b", torch.zeros(3)),
        ("whole", "c", torch.zeros(2)),
    ):
        assert lanes.misfit(fine | {kind: fine[kind] | {name: tensor}}), (kind, name)
    assert lanes.misfit({"4": {"a": torch.zeros(3, 4)}}) and lanes.misfit({"other": {"a": span}})


def test_an_export_of_a_checkpoint_of_another_shape_writes_nothing(tmp_path):
    config, path = prepare.create_run_dir(
        prepare.load_config(words(tmp_path, "theirs", "engine=single"))
    )
    run_dir.record(path, config)
    checkpoints = CheckpointWriter(path / "checkpoints", say=lambda text: None)
    checkpoints.save(2, {"model": {"w": torch.ones(64)}}, {})
    checkpoints.close()
    with pytest.raises(UserError, match="another model"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
