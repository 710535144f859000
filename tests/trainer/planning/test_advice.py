"""What a plan advises: the largest context, the settings that help, and what is refused."""

from types import SimpleNamespace

import pytest

from trainer.config.compose import compose
from trainer.errors import BAD_CONFIG, DONE, UserError
from trainer.planning.advice import best_knobs, largest_context
from trainer.planning.command import plan_command
from trainer.planning.devices import read_device

SMALL = (
    "model.width=32",
    "model.layers=1",
    "model.heads=2",
    "context_length=128",
    "batch_tokens=256",
    "parallel.micro_batch=1",
)


def config_of(*words):
    config = compose([*SMALL, *words]).config
    assert config is not None
    return config


@pytest.mark.parametrize("memory_bytes", [300, 5_000, 70_000, 3_000_000])
def test_the_largest_context_is_close_to_the_last_that_fits_and_takes_few_plans(memory_bytes):
    asked = []

    def peak_of(config):
        assert config.rows == 2
        asked.append(config.context_length)
        return max(200 + config.context_length, 3 * config.context_length - 40_000)

    found = largest_context(config_of(), memory_bytes, peak_of)
    exact = max(length for length in (memory_bytes - 200, 0))
    exact = min(exact, (memory_bytes + 40_000) // 3)
    assert found <= exact < found + max(2 * 256, found / 32)
    assert len(asked) <= 12


def test_no_context_is_found_where_the_shortest_does_not_fit():
    assert largest_context(config_of(), 255, lambda config: config.context_length) == 0


def planned(peak, seconds):
    return SimpleNamespace(peak_bytes=peak, costs=SimpleNamespace(total_seconds=seconds))


def test_the_settings_that_help_most_come_first():
    def plan_of(config):
        saved = {"none": 0, "selective": 30, "full": 50}[config.engine.checkpointing]
        saved += 70 * (config.parallel.context == 4)
        faster = config.parallel.method == "ulysses"
        return planned(100 - saved, 10 + saved / 10 - faster)

    config = config_of("parallel.context=2")
    crowded = best_knobs(config, planned(100, 10), 60, plan_of)
    assert [(knob.setting, knob.saved_bytes) for knob in crowded] == [
        ("parallel.context=4, twice the ranks", 70),
        ("engine.checkpointing=full", 50),
        ("engine.checkpointing=selective", 30),
    ]
    roomy = best_knobs(config, planned(100, 10), 200, plan_of)
    assert [(knob.setting, knob.saved_seconds) for knob in roomy] == [
        ("parallel.method=ulysses", 1)
    ]


@pytest.mark.full
def test_the_command_finds_the_largest_context_and_the_settings_that_help(capsys):
    words = (*SMALL, "data=copy", "evaluation.every=0", "memory=4MB")
    assert plan_command(words) == DONE
    printed = capsys.readouterr().out
    assert "largest context that fits" in printed
    assert "settings that would help most" in printed


def test_the_command_prints_memory_by_kind_and_bytes(capsys):
    words = (*SMALL, "data=copy", "evaluation.every=0", "gpus=2", "memory=4MB", "search=false")
    assert plan_command([*words, "parallel.method=ring"]) == DONE
    printed = capsys.readouterr().out
    for said in (
        "2 ranks = parallel.context=2",
        "weights",
        "activations of mixers",
        "ring backward within a machine",
        "send within a machine",
        "planned in ",
        "FLOPs",
        "tokens/s",
        "this config fits into 3.70 MiB",
    ):
        assert said in printed, printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("gpus=none",), "gpus=none: must be a number of ranks; use gpus=8"),
        (("gpus=3", "parallel.context=2"), "gpus=3: parallel.context=2 does not divide them"),
        (
            ("gpus=8", "parallel.context=2", "parallel.data=2"),
            "gpus=8: parallel.context=2 x parallel.data=2 are 4 ranks; use gpus=4",
        ),
        (("model.width=33",), "model.width=33"),
        (("memory=80",), "memory=80: a size has a unit; write it as memory=80GiB"),
        (("device=h300",), "device=h300: the table has a100, h100, h200, b200, cpu; use one"),
        (("device=none.yaml",), "device=none.yaml: it cannot be read"),
        (("search=no",), "search=no: must be true or false"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(words, said):
    with pytest.raises(UserError) as refused:
        plan_command([*SMALL, "data=copy", *words])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.code == BAD_CONFIG


def test_a_device_of_a_file_is_read_and_its_faults_are_said(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: cpu\nmemory: 4GiB\n")
    with pytest.raises(UserError, match="flops: Field required; write it with python -m scripts"):
        read_device(str(path))
    for name in ("a100", "h100", "h200", "b200", "cpu"):
        device = read_device(name)
        assert device.memory_bytes > 0
        assert device.rate("attention", "bfloat16") <= device.rate("matmul", "bfloat16")
