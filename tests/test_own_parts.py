"""Every part of examples/own/ trains, resumes and is kept with the run; all of them in one run."""

import json
from pathlib import Path

import pytest
import torch

import longspan
from examples.own.mask import Strided
from examples.own.optimiser import Lion
from examples.own.position import PartialRope
from models.masks.algebra import visible
from models.positions.rope import Rope
from models.span import Span
from tests.support.torchrun_here import as_only_rank
from tests.trainer.logs.loggers.test_loggers import config, killed_and_resumed
from trainer.errors import UserError

ROOT = Path(__file__).parents[1]
OWN = ROOT / "examples" / "own"
SMALL = (
    *("model.width=16", "model.layers=1", "model.heads=2", "context_length=32", "batch_tokens=64"),
    *("log.every=1", "evaluation.batches=1", "evaluation.sample_tokens=0", "wandb.mode=disabled"),
)
PARTS = (
    *("mixer=full", "mixer.mask._target_=examples.own.mask.Strided", "mixer.mask.stride=4"),
    *("position._target_=examples.own.position.PartialRope", "position.share=0.5"),
    *("optim._target_=examples.own.optimiser.Lion", "optim.learning_rate=0.01"),
    "evaluation.right._target_=examples.own.evaluation.Accuracy",
    *("logger.diary._target_=examples.own.logger.Diary", "logger.diary.every=2"),
)
NOTES = ("data._target_=examples.own.data.Notes", f"data.folder={ROOT / 'docs'}")
SUMS = ("data._target_=examples.own.task.RunningSum", "data.base=3", "data.length=8")


def trained(directory, *words):
    with as_only_rank():
        return longspan.train([*SMALL, *PARTS, *words, f"run_dir={directory}"])


def test_all_parts_train_in_one_run_which_resumes_and_keeps_their_source(tmp_path):
    data = (*NOTES, f"data.cache={tmp_path / 'cache'}")
    run = trained(tmp_path / "run", *data, "steps=2")
    run = trained(tmp_path / "run", *data, "steps=3")
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    lines = (run.directory / "evaluation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["name"] for row in rows} == {"held_out_loss", "right/share"}
    kept = sorted(path.name for path in (run.directory / "source/1/examples/own").iterdir())
    assert kept == [
        *("data.py", "evaluation.py", "logger.py", "mask.py", "optimiser.py", "position.py")
    ]
    assert not (run.directory / "source" / "2").exists()
    with pytest.raises(UserError, match="is no part of Longspan"):
        run.load()
    assert run.load(trust=True).generate("# ", tokens=3)


def test_a_task_is_learned_by_its_own_targets(tmp_path):
    words = ("steps=40", "evaluation.every=40", "checkpoint.every=0", "optim.learning_rate=0.003")
    losses = trained(tmp_path / "run", *SUMS, *words).losses
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])


def test_every_example_is_tried_here():
    tried = {word.rpartition(".")[0].rpartition(".")[2] for word in (*PARTS, *NOTES, *SUMS)}
    assert {path.stem for path in OWN.glob("*.py")} <= tried


def test_the_logger_has_every_row_once_after_a_kill(tmp_path):
    own = ("logger.diary._target_=examples.own.logger.Diary", "logger.diary.every=1")
    killed_and_resumed(tmp_path, config("logger=[]", *own))
    *lines, last = (tmp_path / "diary.txt").read_text().splitlines()
    rows = [f"step {step}: loss {3 / step:.4f}" for step in range(1, 6)]
    values = ["step 2: held_out_loss 2.5000", "step 4: held_out_loss 2.0000"]
    assert sorted(lines) == sorted(rows + values)
    assert last == "mine closed"


def test_the_mask_is_its_definition_and_causal():
    span = Span.line(1, 12)
    seen = visible(Strided(3), span, span)[0, 0]
    for query in range(12):
        for key in range(12):
            apart = query - key
            assert bool(seen[query, key]) == (apart >= 0 and (apart < 3 or apart % 3 == 0))
    assert Strided(3).causal_from() == 0


def test_the_position_leaves_the_other_channels():
    span = Span.line(1, 5)
    hidden = torch.randn(1, 5, 2, 8)
    turned = PartialRope(0.5).rotate(hidden, span)
    assert torch.equal(turned[..., 4:], hidden[..., 4:])
    assert torch.equal(turned[..., :4], Rope().rotate(hidden[..., :4], span))


def test_the_optimiser_steps_by_the_sign():
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    lion = Lion(learning_rate=0.1, weight_decay=0.5)(layer, dict(layer.named_parameters()))
    layer.weight.grad = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.1, -3.0]])
    lion.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * layer.weight.grad.sign()
    assert torch.allclose(layer.weight, expected)
