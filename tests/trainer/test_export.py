"""A run's model leaves as one safetensors file, whatever ranks wrote it, and comes back equal."""

import json
import os

import pytest
import torch
from safetensors import safe_open

from models.micro_batch import MicroBatch
from models.span import Span
from scripts.export import main
from tests.trainer.verify.test_whole_runs import in_pool
from trainer.checkpoint.reader import CheckpointReader
from trainer.errors import UserError
from trainer.export import CONFIG, WEIGHTS, export, reopen
from trainer.preflight.prepare import load_config
from trainer.run_dir import record
from trainer.verify.whole_runs import COMMON, write_documents


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same three steps by one device and by two, with tied weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = tmp_path_factory.mktemp("runs")
    data = (
        "data=files",
        f"data.path={write_documents(folder / 'text')}",
        f"data.cache={folder / 'cache'}",
    )
    for name, size in (("single", 1), ("fsdp", 2)):
        words = (
            *COMMON,
            *data,
            "steps=3",
            "checkpoint.every=3",
            "model.tie_embeddings=true",
            "precision=float64",
            f"engine={name}",
        )
        words = (*words, f"parallel.data={size}", f"run_dir={folder / name}")
        in_pool(words, size, folder / name)
        record(folder / name, load_config(words, started=size))
    return folder


def test_what_two_ranks_sharded_is_the_model_of_one_device(runs, tmp_path):
    assert export(runs / "fsdp", tmp_path / "one") == 3
    assert (
        main([str(runs / "single" / "checkpoints" / "step_00000003"), str(tmp_path / "other")]) == 0
    )
    one, other = reopen(tmp_path / "one"), reopen(tmp_path / "other")
    assert one.head.weight is one.embed.weight
    for (name, mine), theirs in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=name)
    tokens = torch.arange(12)[None]
    span = Span(
        torch.arange(12)[None],
        torch.zeros(1, 12, dtype=torch.int64),
        torch.zeros(1, 12, dtype=torch.int64),
    )
    torch.testing.assert_close(
        one(MicroBatch(tokens, span)), other(MicroBatch(tokens, span)), rtol=0, atol=1e-9
    )


def test_the_file_holds_every_tensor_of_the_checkpoint_bit_for_bit(runs, tmp_path):
    export(runs / "fsdp", tmp_path)
    archive, place = (
        CheckpointReader(runs / "fsdp" / "checkpoints"),
        runs / "fsdp" / "checkpoints" / "step_00000003",
    )
    saved = archive.load(place, {"model": archive.blank(place, "model")}).state["model"]
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(saved)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in saved.items())
    again = reopen(tmp_path).state_dict()
    assert again.keys() == saved.keys() and all(
        torch.equal(again[name], tensor) for name, tensor in saved.items()
    )
    about = json.loads((tmp_path / CONFIG).read_text())
    assert (
        about["step"] == 3
        and about["config"]["model"]["width"] == 32
        and about["vocabulary"] == 257
    )


def test_a_folder_that_holds_a_model_is_left_alone(runs, tmp_path, capsys):
    export(runs / "single", tmp_path)
    before = (tmp_path / WEIGHTS).stat().st_mtime_ns
    assert main([str(runs / "single"), str(tmp_path)]) == 2
    assert (
        "already" in capsys.readouterr().err and (tmp_path / WEIGHTS).stat().st_mtime_ns == before
    )


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        export(tmp_path, tmp_path / "out")
    assert main([str(tmp_path)]) == 2


def test_a_damaged_export_is_said_to_be_one(runs, tmp_path):
    export(runs / "single", tmp_path)
    raw = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match="export it again"):
        reopen(tmp_path)
