"""Frozen parameters and groups of the optimiser: exact on any ranks and engine."""

import pytest
import torch

from models.micro_batch import MicroBatch
from parallel.engines.materialize import materialize
from tests.support.pool import ranks
from tests.trainer.test_stages import SMALL, config_of, faults_of, in_rank, saved_weights
from trainer.config.build_model import build_model
from trainer.config.instantiate import instantiate
from trainer.logs.jsonl import METRICS, read
from trainer.objectives.stream import open_rows
from trainer.optim.selection import chosen
from trainer.run_dir import make_run_dir, record
from trainer.verify.whole_runs import write_documents

CHOICES = (
    "optim.freeze=[embed.*,blocks.0.mixer.*]",
    "optim.groups=[{match:['*.mixer.q.weight'],learning_rate:0.0005,weight_decay:0.3},"
    "{match:['*.mixer.*','*norm.weight'],learning_rate:0.01}]",
    "optim.weight_decay=0.05",
)
STEPS = 4


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("selection")
    glob = write_documents(folder / "text")
    data = ("data=files", f"data.path={glob}", f"data.cache={folder / 'cache'}")
    sizes = ("context_length=62", "batch_tokens=124", f"steps={STEPS}", "evaluation.every=0")
    return [*SMALL, *data, *sizes, *CHOICES]


def built(words):
    config = config_of(words)
    stream = open_rows(config, "train")
    with torch.device("meta"):
        model = build_model(config, stream.vocabulary).double()
    materialize(model, torch.device("cpu"), config.seed)
    return config, stream, model


@pytest.fixture(scope="module")
def hand(words):
    """The same steps with torch's AdamW, whose groups are written out by name."""
    config, stream, model = built(words)
    sorted_by = {}
    for name, parameter in model.named_parameters():
        if name.startswith(("embed.", "blocks.0.mixer.")):
            parameter.requires_grad_(False)
            continue
        key = (0.003, 0.05)
        if name.endswith("norm.weight"):
            key = (0.01, 0.0)
        elif ".mixer.q." in name:
            key = (0.0005, 0.3)
        elif ".mixer." in name:
            key = (0.01, 0.05)
        sorted_by.setdefault(key, []).append(parameter)
    assert len(sorted_by) == 4
    groups = [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted_by.items()
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    schedule = instantiate(config.schedule, {}, "schedule")
    losses = []
    cursor = stream.start()
    for step in range(1, STEPS + 1):
        batch, cursor = stream.read(cursor)
        loss = (
            model(MicroBatch(batch.inputs(), batch.span(), batch.targets())).sum()
            / batch.predictions()
        )
        loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * schedule(step, STEPS)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.short("3-settings1-1e-09")
@pytest.mark.parametrize(
    "size, settings, tolerance",
    [
        (1, ("engine=single",), 1e-9),
        (3, ("engine=fsdp", "parallel.context=3"), 1e-9),
        pytest.param(
            2,
            ("engine=single", "parallel.data=2", "parallel.context=1"),
            1e-9,
            marks=pytest.mark.full,
        ),
        pytest.param(
            2,
            ("engine=deepspeed", "engine.zero_stage=2", "parallel.context=2"),
            1e-5,
            marks=pytest.mark.full,
        ),
        (2, ("engine=deepspeed", "engine.zero_stage=3", "parallel.context=2"), 1e-5),
    ],
)
def test_frozen_and_grouped_parameters_are_those_of_a_run_by_hand(
    words, hand, tmp_path, size, settings, tolerance
):
    directory = tmp_path / "run"
    run = [*words, *settings, f"run_dir={directory}"]
    if "engine=deepspeed" in settings:
        run.append("precision=float32")
    make_run_dir(directory)
    record(directory, config_of(run))
    assert ranks(size, in_rank, run, str(directory), None) == [0] * size
    losses, weights = hand
    rows = list(read(directory / METRICS))
    for row, loss in zip(rows, losses, strict=True):
        assert abs(row["loss"] / loss - 1) < tolerance
    saved = saved_weights(directory, STEPS)
    _, _, initial = built(words)
    for name, parameter in initial.state_dict().items():
        # The mean: Adam's first steps are as long for a gradient of 1e-9 as for any other.
        wrong = (saved[name].double() - weights[name]).abs().mean()
        assert wrong < 3 * tolerance, name
        if name.startswith(("embed.", "blocks.0.mixer.")):
            assert torch.equal(saved[name], parameter.to(saved[name].dtype)), name


def test_a_pattern_chooses_by_every_name_of_a_tied_parameter():
    config = config_of([*SMALL, "model.tie_embeddings=true", "model.vocabulary=100"])
    with torch.device("meta"):
        model = build_model(config, 100)
    assert chosen(model, ["head.*"]) == {"embed.weight"}
    assert chosen(model, ["blocks.1.mixer.?.weight"]) == {
        "blocks.1.mixer.q.weight",
        "blocks.1.mixer.k.weight",
        "blocks.1.mixer.v.weight",
    }


@pytest.mark.parametrize(
    "word, message",
    [
        (
            "optim.freeze=[blocks.0.mixer.qq.weight]",
            "optim.freeze=[blocks.0.mixer.qq.weight]: no parameter is called"
            " blocks.0.mixer.qq.weight; did you mean blocks.0.mixer.q.weight?",
        ),
        ("optim.freeze=['*']", "optim.freeze=[*]: it chooses every parameter that is trained, and"),
        (
            "optim.groups=[{match:[zzz],learning_rate:0.1}]",
            "optim.groups.0.match=[zzz]: no parameter is called zzz; known: embed.weight,",
        ),
        (
            "optim.groups=[{match:['*']},{match:['embed.*'],learning_rate:0.1}]",
            "optim.groups.1.match=[embed.*]: groups before it have chosen all of these parameters",
        ),
        (
            "optim.groups=[{match:['*'],learning_rat:0.1}]",
            "optim.groups.0.learning_rat=0.1: there is no such setting; did you mean"
            " optim.groups.0.learning_rate?",
        ),
        ("optim.groups=[{learning_rate:0.1}]", "optim.groups.0.match is not set"),
    ],
)
def test_a_pattern_that_chooses_nothing_is_one_message(word, message):
    faults = faults_of(word, "model.tie_embeddings=false", "optim=adamw")
    assert len(faults) == 1, faults
    assert faults[0].startswith(message), faults
