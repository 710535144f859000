"""What a file names is built only where it is Longspan's own and of the kind that its place asks
for."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from models.attention.full import Attention
from models.positions.base import Position
from parallel.engines.materialize import materialize
from scripts.export import main
from tests.trainer.verify.test_killed import words
from trainer import run_dir
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.build_model import build_model
from trainer.config.groups import CONF
from trainer.config.trust import stranger, targets
from trainer.errors import UserError
from trainer.export import CONFIG, WEIGHTS, reopen
from trainer.preflight import prepare

BUILT: list[str] = []


class Strange(Attention):
    """A user's own mixer, which says when it is built."""

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position):
        BUILT.append("strange")
        super().__init__(width, heads, kv_heads, position)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with one checkpoint of its model."""
    config, path = prepare.create_run_dir(
        prepare.load_config(words(tmp_path, "run", "engine=single", "model.layers=1"))
    )
    run_dir.record(path, config)
    with torch.device("meta"):
        model = build_model(config, 257)
    materialize(model.double() if config.precision == "float64" else model, torch.device("cpu"), 0)
    checkpoints = CheckpointWriter(path / "checkpoints", say=lambda text: None)
    checkpoints.save(2, {"model": dict(model.state_dict())}, {})
    checkpoints.close()
    BUILT.clear()
    return path


def span(config: dict, place: str, node: dict) -> None:
    *way, last = place.split(".")
    for key in way:
        config = config[key] if config.get(key) is not None else config.setdefault(key, {})
    config[last] = node


NAMED = {
    "a process": ("mixer", "subprocess.Popen"),
    "a process in the place of a setting": ("mixer.inner", "subprocess.Popen"),
    "a function of the system": ("position", "os.system"),
    "a class that a module of ours imported": ("mixer", "trainer.run_dir.Path"),
    "a module of ours that imported another": ("data", "trainer.run_dir.subprocess.Popen"),
    "a class of ours of another kind": ("model", "trainer.checkpoint.writer.CheckpointWriter"),
    "a class of ours in the place of a mixer": ("mixer", "trainer.logs.jsonl.Metrics"),
    "a function of ours": ("mixer", "trainer.run_dir.make_run_dir"),
    "a source of another package": ("data", "tests.trainer.config.test_trust.Strange"),
    "another engine": ("engine", "subprocess.Popen"),
    "another schedule": ("schedule", "subprocess.Popen"),
    "another optimiser": ("optim", "torch.optim.AdamW"),
    "a name with a path": ("mixer", "models/../../x.Y"),
    "a mixer of the user": ("mixer", "tests.trainer.config.test_trust.Strange"),
}


@pytest.mark.parametrize("how", NAMED)
def test_neither_exporting_nor_reopening_builds_what_a_file_names(how, run, tmp_path, capsys):
    config = run_dir.plain_config(run_dir.read_config(run))
    place, target = NAMED[how]
    if place == "mixer.inner":
        config["mixer"] = {"_target_": "models.attention.full.Attention"}
    if place in ("mixer", "mixer.inner", "position", "model"):
        before = config[place] if place == "model" else {}
        span(config, place, {**before, "_target_": target})
    else:
        config[place]["_target_"] = target
    (run / run_dir.CONFIG).write_text(json.dumps(config))
    assert main([str(run), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert (
        f"{place}._target_={target}" in told
        and "trust=true" in told
        and not (tmp_path / "out").exists()
    )
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / CONFIG).write_text(json.dumps({"step": 1, "vocabulary": 257, "config": config}))
    save_file({"w": torch.zeros(1)}, theirs / WEIGHTS)
    with pytest.raises(UserError, match="trust=true"):
        reopen(theirs)
    assert not BUILT


def test_a_users_own_part_is_built_where_it_is_trusted(run, tmp_path, capsys):
    config = run_dir.plain_config(run_dir.read_config(run))
    config["mixer"] = {"_target_": "tests.trainer.config.test_trust.Strange"}
    (run / run_dir.CONFIG).write_text(json.dumps(config))
    assert main([str(run), str(tmp_path / "out"), "trust=true"]) == 0, capsys.readouterr().err
    with pytest.raises(UserError, match="trust=true"):
        reopen(tmp_path / "out")
    BUILT.clear()
    assert isinstance(reopen(tmp_path / "out", trust=True), nn.Module)
    # Once on the meta device, once on the CPU for the values that its constructor gives.
    assert BUILT == ["strange", "strange"]


def test_every_part_that_the_configs_offer_may_be_named():
    own = set()
    for place in ("mixer", "position", "memory", "data", "optim", "schedule", "engine", "model"):
        for file in (CONF / place).glob("*.yaml"):
            tree = yaml.safe_load(file.read_text())
            own.update(pair for pair in targets(tree, place) if isinstance(pair[1], str))
    from_files = {pair for pair in own if "." in pair[1]}
    assert len(from_files) > 50
    assert [answer for pair in sorted(from_files) if (answer := stranger(*pair))] == []


def test_weights_of_other_shapes_take_no_memory(run, tmp_path):
    assert main([str(run), str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / CONFIG).read_text())
    about["config"]["model"]["width"] = 1 << 24
    (tmp_path / "out" / CONFIG).write_text(json.dumps(about))
    with pytest.raises(UserError, match="in the model"):
        reopen(tmp_path / "out")
    about["config"]["model"].update(width=64, layers=4000)
    (tmp_path / "out" / CONFIG).write_text(json.dumps(about))
    with pytest.raises(UserError, match="4000 layers"):
        reopen(tmp_path / "out")
