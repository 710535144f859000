"""Adapters of low rank: exact on any ranks and engine, in peft's format, merged on export."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from models.lora import LoraLinear, adapters, merged
from models.micro_batch import MicroBatch
from parallel.engines.materialize import materialize
from tests.support.pool import ranks
from tests.trainer.test_stages import SMALL, config_of, faults_of, in_rank, saved_weights
from trainer.config.build_model import build_model
from trainer.config.instantiate import instantiate
from trainer.errors import UserError
from trainer.export import export, reopen
from trainer.init_from.adapters import export_adapter, read_adapter
from trainer.logs.jsonl import METRICS, read
from trainer.objectives.stream import open_rows
from trainer.run_dir import make_run_dir, record
from trainer.verify.whole_runs import write_documents

STEPS = 4
LORA = (
    "lora.rank=3",
    "lora.alpha=6",
    "lora.targets=[blocks.*.mixer.*,blocks.1.feedforward.down]",
)
TARGETS = [
    *(f"blocks.{block}.mixer.{name}" for block in (0, 1) for name in ("q", "k", "v", "out")),
    "blocks.1.feedforward.down",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("lora")
    glob = write_documents(folder / "text")
    data = ("data=files", f"data.path={glob}", f"data.cache={folder / 'cache'}")
    sizes = ("context_length=62", "batch_tokens=124", f"steps={STEPS}", "evaluation.every=0")
    return [*SMALL, *data, *sizes, "optim.learning_rate=0.01"]


def built(words):
    config = config_of(words)
    stream = open_rows(config, "train")
    with torch.device("meta"):
        model = build_model(config, stream.vocabulary).double()
    materialize(model, torch.device("cpu"), config.seed)
    return config, stream, model


def by_hand(words):
    """Trains A and B alone, in a model without adapters whose weights are W + 2 B A.

    Returns:
        the losses, the final A and B by name, and the model's weights with them.
    """
    config, stream, base = built(words)
    _, _, adapted = built([*words, *LORA])
    factors = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    fixed = {name: parameter.detach() for name, parameter in base.named_parameters()}

    def weights():
        changed = dict(fixed)
        for name in TARGETS:
            product = factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
            changed[f"{name}.weight"] = fixed[f"{name}.weight"] + 2 * product
        return changed

    optimiser = torch.optim.AdamW(
        list(factors.values()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    schedule = instantiate(config.schedule, {}, "schedule")
    losses = []
    cursor = stream.start()
    for step in range(1, STEPS + 1):
        batch, cursor = stream.read(cursor)
        inputs = MicroBatch(batch.inputs(), batch.span(), batch.targets())
        loss = functional_call(base, weights(), (inputs,)).sum() / batch.predictions()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(factors.values()), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 0.01 * schedule(step, STEPS)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, factors, {name: tensor.detach() for name, tensor in weights().items()}


@pytest.fixture(scope="module")
def hand(words):
    return by_hand(words)


def run_on(size: int, run: list[str], directory) -> list[float]:
    run = [*run, f"run_dir={directory}"]
    make_run_dir(directory)
    record(directory, config_of(run))
    assert ranks(size, in_rank, run, str(directory), None) == [0] * size
    return [row["loss"] for row in read(directory / METRICS)]


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    """A run on one rank."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    run_on(1, [*words, *LORA], directory)
    return directory


@pytest.mark.short("3-settings1-1e-09")
@pytest.mark.parametrize(
    "size, settings, tolerance",
    [
        (1, ("engine=single",), 1e-9),
        (3, ("engine=fsdp", "parallel.context=3"), 1e-9),
        pytest.param(
            3,
            ("engine=single", "parallel.context=3", "parallel.layout=contiguous"),
            1e-9,
            marks=pytest.mark.full,
        ),
        pytest.param(
            2,
            ("engine=fsdp", "parallel.data=2", "engine.checkpointing=selective"),
            1e-9,
            marks=pytest.mark.full,
        ),
        (2, ("engine=deepspeed", "parallel.context=2", "precision=float32"), 1e-5),
    ],
)
def test_adapters_are_those_of_a_run_by_hand(words, hand, tmp_path, size, settings, tolerance):
    losses = run_on(size, [*words, *LORA, *settings], tmp_path / "run")
    expected, factors, _ = hand
    for loss, right in zip(losses, expected, strict=True):
        assert abs(loss / right - 1) < tolerance
    saved = saved_weights(tmp_path / "run", STEPS)
    _, _, initial = built(words)
    for name, parameter in initial.named_parameters():
        assert torch.equal(saved[name], parameter.to(saved[name].dtype)), name
    for name, tensor in factors.items():
        assert (saved[name] - tensor).abs().mean() < tolerance, name
        assert tensor.abs().max() > 1e-3, name


def test_before_the_first_step_the_model_is_the_one_without_adapters(words):
    _, stream, base = built(words)
    _, _, adapted = built([*words, *LORA])
    assert [name for name, _ in adapters(adapted)] == TARGETS
    assert sum(type(part) is LoraLinear for part in adapted.modules()) == len(TARGETS)
    batch, _ = stream.read(stream.start())
    inputs = MicroBatch(batch.inputs(), batch.span(), batch.targets())
    assert torch.equal(base(inputs), adapted(inputs))


def test_an_export_has_the_adapters_in_its_weights(words, hand, trained, tmp_path):
    export(trained, tmp_path / "exported")
    model = reopen(tmp_path / "exported")
    assert not list(adapters(model))
    _, _, weights = hand
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, weights[name], rtol=0, atol=1e-9), name


def test_merging_leaves_no_trace_of_adapters(words):
    _, _, adapted = built([*words, *LORA])
    for _, layer in adapters(adapted):
        torch.nn.init.normal_(layer.lora_B)
    _, stream, base = built(words)
    base.load_state_dict(merged(adapted, adapted.state_dict()))
    batch, _ = stream.read(stream.start())
    inputs = MicroBatch(batch.inputs(), batch.span(), batch.targets())
    assert torch.allclose(base(inputs), adapted(inputs), rtol=1e-12, atol=1e-12)


def test_adapters_in_peft_s_format_are_read_back(words, hand, trained, tmp_path):
    folder = tmp_path / "adapter"
    assert export_adapter(trained, folder) == STEPS
    about = json.loads((folder / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", 3, 6.0)
    assert about["target_modules"] == TARGETS
    tensors = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.blocks.0.mixer.q.lora_A.weight" in tensors
    assert {tuple(tensor.shape) for tensor in tensors.values()} >= {(3, 16), (16, 3)}
    _, factors, weights = hand
    again = dict(read_adapter(folder))
    assert again.keys() == factors.keys()
    for name, tensor in factors.items():
        assert torch.allclose(again[name], tensor, rtol=0, atol=1e-9)
    # A new run begins with them: its first loss is that of the trained model.
    begun = [*words, *LORA, "steps=1", f"lora.adapter={folder}", "parallel.context=3"]
    losses = run_on(3, [*begun, "engine=fsdp"], tmp_path / "run")
    _, stream, base = built(words)
    batch, _ = stream.read(stream.start())
    inputs = MicroBatch(batch.inputs(), batch.span(), batch.targets())
    right = functional_call(base, weights, (inputs,)).sum().item() / batch.predictions()
    assert abs(losses[0] / right - 1) < 1e-9
    with pytest.raises(UserError, match="holds adapter_model"):
        export_adapter(trained, folder)


def test_weights_without_adapters_begin_a_run_with_some(words, trained, tmp_path):
    plain = tmp_path / "plain"
    run_on(1, [*words, "steps=1"], plain)
    settings = [*words, *LORA, "steps=1", "seed=5"]
    losses = run_on(1, [*settings, f"init_from={plain}"], tmp_path / "tuned")
    assert losses[0] != run_on(1, settings, tmp_path / "other")[0]
    source = saved_weights(plain, 1)
    tuned = saved_weights(tmp_path / "tuned", 1)
    for name, tensor in source.items():
        assert torch.equal(tuned[name], tensor), name


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ("lora.rank=3", "lora.targets=[blocks.*.qq]"),
            "lora.targets=['blocks.*.qq']: no linear layer is called blocks.*.qq; known:"
            " blocks.0.mixer.q,",
        ),
        (("lora.rank=40",), "lora.rank=40: blocks.0.mixer.q is 16 x 16, and a matrix of that rank"),
        (
            ("lora.rank=2", "lora.targets=[head]", "model.tie_embeddings=false"),
            "lora.targets=[head]: the model reads the weight of head without calling the layer",
        ),
        (
            ("lora.rank=2", "model=latent", "lora.targets=[blocks.*]"),
            "lora.targets=[blocks.*]: the model reads the weight of blocks.0.mixer.up",
        ),
        (("lora.adapter=/nowhere",), "lora.adapter=/nowhere: there are no adapters to put it into"),
        (
            ("lora.rank=2", "lora.adapter=/nowhere"),
            "lora.adapter=/nowhere: there is no /nowhere/adapter_config.json; name a folder",
        ),
        (("lora.rank=2", "optim.freeze=['*lora*']"), "optim.freeze=[*lora*]: it chooses every"),
    ],
)
def test_adapters_that_cannot_be_are_one_message(more, message):
    faults = faults_of(*more)
    assert len(faults) == 1, faults
    assert faults[0].startswith(message), faults


@pytest.mark.parametrize(
    "more, changes, message",
    [
        (("lora.rank=2",), {}, "its lora.rank is 3, here 2; use lora.rank=3"),
        (("lora.rank=3", "lora.alpha=1"), {}, "its lora.alpha is 6.0, here 1.0"),
        (LORA[:2], {}, "10 tensors do not fit, blocks.0.feedforward.down.lora_A is absent there"),
        (LORA, {"use_dora": True}, "it has use_dora=True, which our adapters have not"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_message(trained, tmp_path, more, changes, message):
    folder = tmp_path / "adapter"
    export_adapter(trained, folder)
    about = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(about | changes))
    faults = faults_of(*more, f"lora.adapter={folder}")
    assert len(faults) == 1, faults
    assert faults[0].startswith(f"lora.adapter={folder}: {message}"), faults
