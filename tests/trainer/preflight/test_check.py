"""Every wish that cannot be honoured is refused with the wish, the fact and a way out, and all of
them together."""

import subprocess
import sys
import time

import pytest
import torch

from tests.support import forked_python
from trainer.config.compose import compose
from trainer.config.groups import choices
from trainer.preflight import check_engine, check_launch
from trainer.preflight.check import check_config
from trainer.preflight.prepare import load_config
from trainer.preflight.reach import fitting

SMALL = ["context_length=64", "batch_tokens=128"]


def faults(*words: str) -> list[str]:
    asked = compose([*SMALL, *words])
    return (
        asked.faults
        if asked.config is None
        else check_config(asked.config, asked.given, asked.mended, asked.faults)
    )


def limit_machine(monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int) -> None:
    """Let the checks see a machine of so many cores and GPUs."""
    for module in (check_launch, check_engine):
        monkeypatch.setattr(module, "machine_limits", lambda: (cores, gpus))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_machine(monkeypatch, 2, 0)


def test_a_good_wish_has_no_fault() -> None:
    assert faults("parallel.context=2", "parallel.data=2", "mixer=sliding", "mixer.window=8") == []


WRONG = [
    # words, and what the one message must say: the wish, the fact, the way out
    ("parallel.contxt=2", ["parallel.contxt=2", "no such setting", "parallel.context"]),
    ("+parallel.contxt=2", ["parallel.contxt=2", "no such setting", "parallel.context"]),
    ("wandb=[abc]", ["wandb=[abc]: a group of settings is needed; write wandb.NAME=VALUE"]),
    ("log=[1]", ["log=[1]: a group of settings is needed; write log.NAME=VALUE"]),
    ("heads=2", ["heads=2", "model.heads"]),
    ("mixer=slidng", ["mixer=slidng", "mixer=sliding", "multi_query"]),
    ("model=ful", ["model=ful", "model=full"]),
    ("mixer.window=4", ["mixer", "no mixer is chosen", "mixer=NAME"]),
    ("mixer=sliding mixer.raech=4", ["mixer.raech=4", "Sliding", "mixer.window"]),
    ("mixer=sliding mixer.window=0", ["window", "0"]),
    ("position.bas=4", ["position.bas=4", "Rope", "position.theta"]),
    ("model.wdth=4", ["model.wdth=4", "Decoder", "model.width"]),
    ("data.tokenzer=bytes", ["data.tokenzer=bytes", "data.tokenizer"]),
    ("data.tokenizer=nowhere/at/all.json", ["nowhere/at/all.json"]),
    ("data=files data.path=nowhere/*.txt", ["nowhere/*.txt"]),
    (
        "model._target_=models.architectures.decoder.Decodr",
        ["models.architectures.decoder.Decodr", "Decoder"],
    ),
    ("model._target_=models.nowhere.Decoder", ["models.nowhere.Decoder"]),
    ("steps=many", ["steps=many", "whole number", "steps=100"]),
    ("steps=true", ["steps=true", "number"]),
    ("steps=0", ["steps=0", "at least 1"]),
    ("optim.learning_rate=-1", ["optim.learning_rate=-1", "more than 0"]),
    ("optim.learning_rate=nan", ["optim.learning_rate=nan"]),
    ("optim.betas=[0.9]", ["optim.betas=[0.9]", "list of two"]),
    ("schedule.final_ratio=7", ["final_ratio", "7"]),
    ("precision=float16", ["precision=float16", "bfloat16"]),
    ("parallel.micro_batch=0", ["parallel.micro_batch=0", "auto", "at least 1"]),
    ("parallel.micro_batch=3", ["parallel.micro_batch=3", "2 rows", "parallel.micro_batch=2"]),
    ("name=a/b", ["name=a/b", "slash"]),
    ("steps=1,2", ["steps=1,2", "one run"]),
    ("-m", ["-m", "sweeps are python -m trainer -m"]),
    ("--multirun", ["--multirun", "sweeps are python -m trainer -m"]),
    ("hydra.run.dir=x", ["hydra.run.dir=x", "run_dir=PATH"]),
    ("steps", ["steps", "KEY=VALUE"]),
    ("~steps", ["steps is not set", "for example steps="]),
    ("~nosuch", ["~nosuch: no setting of that name"]),
    ("~steps=3", ["~steps: its value is 100", "steps=VALUE"]),
    ("batch_tokens=100", ["batch_tokens=100", "context_length=64", "batch_tokens=64"]),
    ("model.heads=3", ["model.width=128", "model.heads=3", "model.width=129"]),
    ("model.kv_heads=3", ["model.kv_heads=3", "model.heads=4"]),
    ("model.max_length=64", ["model.max_length=64", "nothing in this model takes it"]),
    ("model.max_length=32", ["context_length=64", "32"]),
    ("model.vocabulary=7", ["model.vocabulary=7", "257"]),
    ("model.pattern=[fll]", ["model.pattern", "fll", "full"]),
    ("model=decoder", ["model.pattern", "mixer=full"]),
    (
        "parallel.context=8 parallel.method=ulysses",
        ["parallel.method=ulysses", "8 query heads", "model.heads=4", "method=ring"],
    ),
    ("parallel.context=4 parallel.data=5", ["20 ranks", "2 cores", "launch.oversubscribe=true"]),
    ("parallel.ulysses=2", ["parallel.ulysses=2", "parallel.method=usp", "null"]),
    ("parallel.tensor=2", ["parallel.tensor=2", "scope", "parallel.context=2"]),
    ("parallel.pipeline=2", ["parallel.pipeline=2", "scope"]),
    ("parallel.experts=2", ["parallel.experts=2", "number of ranks, 1", "parallel.experts=1"]),
    (
        "parallel.context=2 parallel.experts=2",
        ["parallel.experts=2", "no layer", "parallel.experts=1", "model=switch"],
    ),
    (
        "model=switch parallel.context=2 parallel.experts=2 model.feedforwards.switch.experts=5",
        ["5 experts of blocks.1"],
    ),
    (
        (
            "memory=segments memory.length=0 mixer=gated_delta position=learned"
            " position.max_length=4096"
        ),
        ["go on", "position=rope"],
    ),
    (
        "memory.name=segments",
        ["memory.name=segments", "models.memory.base.Memory", "memory=segments"],
    ),
    ("memory.length=5", ["memory.length=5", "memory=none"]),
    (
        "launch.name=kubernetes",
        ["launch.name=kubernetes", "multinode", "slurm", "launch.name=local"],
    ),
    (
        "engine.checkpointing=selective engine.compile=true",
        ["engine.checkpointing=selective", "engine.compile=false"],
    ),
    (
        "engine.offload_activations=true",
        ["engine.offload_activations=true", "host's memory already", "offload_activations=false"],
    ),
    (
        "engine=deepspeed engine.offload_activations=true",
        ["engine.offload_activations=true", "host's memory already"],
    ),
    (
        "launch=slurm launch.dry_run=true launch.gpus=0 engine.offload_activations=true",
        ["engine.offload_activations=true", "host's memory already"],
    ),
    (
        "engine=deepspeed +engine.tile_tokens=64",
        ["engine.tile_tokens=64", "DeepSpeed", "engine=fsdp"],
    ),
    (
        "engine.compile=true engine.tile_tokens=64",
        ["engine.tile_tokens=64", "compiled", "engine.compile=false"],
    ),
    (
        "engine=deepspeed +engine.head_groups=2",
        ["engine.head_groups=2", "DeepSpeed", "engine=fsdp"],
    ),
    (
        "engine.compile=true engine.head_groups=2",
        ["engine.head_groups=2", "compiled", "engine.compile=false"],
    ),
    (
        "engine.checkpointing=selective engine.head_groups=2",
        ["engine.head_groups=2", "keeps attention", "engine.checkpointing=full"],
    ),
    ("parallel.time=2 engine.head_groups=2", ["piece to piece", "parallel.time=1"]),
    (
        "parallel.context=2 parallel.method=ulysses engine.head_groups=4",
        ["engine.head_groups=4", "among 2 ranks, and a group has 1", "engine.head_groups=2"],
    ),
    ("engine.zero_stage=2", ["engine.zero_stage=2", "engine=deepspeed", "engine=single"]),
    ("engine.reshard_after_forward=true", ["engine.reshard_after_forward=true", "engine=fsdp"]),
    ("+engine.replicate=2 parallel.context=2 engine=single", ["engine.replicate=2", "engine=fsdp"]),
    (
        "engine=fsdp engine.replicate=3 parallel.context=4",
        ["engine.replicate=3", "ranks, 4", "engine.replicate=2"],
    ),
    ("data.held_out=0", ["data.held_out=0", "evaluation.every=0"]),
    ("resume=nowhere", ["resume=nowhere", "no such directory"]),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wish_that_cannot_be_honoured_is_refused_in_one_message(
    words: str, said: list[str]
) -> None:
    found = faults(*words.split())
    assert len(found) == 1, found
    for each in said:
        assert each in found[0]


@pytest.mark.parametrize("engine", ["single", "fsdp", "deepspeed"])
def test_activations_are_offloaded_where_there_is_an_accelerator(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"engine={engine}", "engine.offload_activations=true"
    assert (
        faults(*words, "launch=slurm", "launch.dry_run=true") == []
    )  # a batch job has a GPU a rank, whatever is here
    limit_machine(monkeypatch, 2, 1)
    assert faults(*words) == []


@pytest.mark.parametrize(("heads", "ring"), [(2, 3), (4, 2), (None, 4), (4, None)])
def test_under_usp_heads_times_ring_is_the_context(heads, ring) -> None:
    words = [f"parallel.{key}={size}" for key, size in (("ulysses", heads), ("ring", ring)) if size]
    found = faults("parallel.context=4", "parallel.method=usp", *words)
    assert len(found) == 1
    assert "parallel.context" in found[0]


def test_deepspeed_is_refused_in_float64() -> None:
    assert any(
        "precision=float64" in each for each in faults("engine=deepspeed", "precision=float64")
    )


def test_more_ranks_than_gpus_are_refused_where_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_machine(monkeypatch, 64, 2)
    assert "2 GPUs" in faults("parallel.context=3")[0]
    assert faults("parallel.context=2") == []


def test_oversubscribing_is_allowed_when_it_is_wished() -> None:
    assert faults("parallel.context=4", "parallel.data=5", "launch.oversubscribe=true") == []


def test_under_torchrun_the_ranks_must_be_those_of_the_config() -> None:
    asked = compose([*SMALL, "parallel.context=2"]).config
    assert asked is not None
    assert check_config(asked, started=2) == []
    assert "torchrun started 3" in check_config(asked, started=3)[0]


def test_under_torchrun_what_only_our_own_launcher_can_do_is_refused_by_name() -> None:
    for setting, said in (
        ("launch.grace_s=5", "launch.grace_s=5: torchrun stops the ranks"),
        ("launch.max_restarts=2", "give --max-restarts to torchrun"),
        ("launch=multinode", "launch=multinode: torchrun has started the ranks already"),
    ):
        asked = compose([*SMALL, "parallel.context=2", setting]).config
        assert asked is not None
        assert any(said in each for each in check_config(asked, started=2))


def test_faults_of_every_kind_are_shown_together() -> None:
    found = faults(
        "stepz=3",
        "mixer=slidng",
        "optim.learning_rate=-1",
        "batch_tokens=100",
        "model.kv_heads=3",
        "foo",
    )
    for each in ("stepz", "slidng", "learning_rate=-1", "batch_tokens=100", "kv_heads=3", "foo"):
        assert sum(each in fault for fault in found) == 1
    assert len(found) == 6


def test_nothing_more_is_said_of_a_value_that_was_a_fault_already() -> None:
    assert faults("batch_tokens=none_at_all") == [
        "batch_tokens=none_at_all: a whole number is needed; for example batch_tokens=8192"
    ]


def test_checking_leaves_the_default_device_alone() -> None:
    assert faults() == []
    assert torch.empty(1).device.type == "cpu"


def command(*words: str) -> tuple[int, str, str]:
    done = forked_python.run([sys.executable, "-m", "trainer", *words])
    return done.returncode, done.stdout, done.stderr


def test_a_refused_command_ends_with_2_and_messages_only(tmp_path) -> None:
    words = ("parallel.contxt=2", "+model.heads=3", "mixer=slidng", f"run_dir={tmp_path / 'run'}")
    began = time.monotonic()
    done = subprocess.run(  # with its imports, which are most of its time
        [sys.executable, "-m", "trainer", *words], capture_output=True, text=True, timeout=120
    )
    seconds = time.monotonic() - began
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 3
    assert not (tmp_path / "run").exists()
    assert seconds < 60  # under 4 s on a quiet machine; this one may be shared


def test_a_dry_run_says_what_would_be_started_and_starts_nothing(tmp_path) -> None:
    code, out, err = command(
        "launch.dry_run=true", "parallel.context=2", f"run_dir={tmp_path / 'run'}"
    )
    assert (code, err) == (0, "")
    assert "ranks    2" in out
    assert str(tmp_path / "run") in out
    assert not (tmp_path / "run").exists()


def test_help_names_groups_and_keys_with_their_defaults() -> None:
    code, out, _ = command("--help")
    assert code == 0
    for each in (
        "mixer=",
        "multi_query",
        "parallel.context (1)",
        "experiment=quickstart",
        "Exit status",
    ):
        assert each in out


def test_a_wish_is_the_config_when_nothing_is_wrong() -> None:
    assert load_config([*SMALL, "seed=7"]).seed == 7


UNREACHED = [
    ("position=alibi mixer=gated_delta", "nothing in this model takes a position", "sliding"),
    ("position.theta=500 mixer=retention", "nothing in this model takes a position", "sliding"),
    ("mixer=full model.pattern=[full]", "model.pattern", "mixer is set and replaces it"),
    ("+mixer@model.mixers.sliding=sliding", "model.mixers.sliding is set", "does not name it"),
]


@pytest.mark.parametrize(("words", "said", "remedy"), UNREACHED)
def test_what_was_written_and_reaches_no_part_is_refused_with_the_parts_that_take_it(
    words, said, remedy
) -> None:
    told = faults(*words.split())
    assert len(told) == 1 and said in told[0] and remedy in told[0], told


def test_what_reaches_a_part_or_asks_for_nothing_is_no_fault() -> None:
    for words in (
        "position=none mixer=gated_delta",
        "position=learned mixer=gated_delta",
        "model.heads=8 mixer=multi_query",
    ):
        assert faults(*words.split()) == []


IDLE = [
    ("mixer=hyena model.heads=8", "model.heads=8 reaches no part of this model", "gated_delta"),
    (
        "mixer=multi_query model.kv_heads=2",
        "model.kv_heads=2 reaches no part of this model",
        "sliding",
    ),
    ("model=ntm model.layers=2", "model.layers=2 reaches no part of this model", "lstm"),
    ("model=key_value model.ffn=3", "model.ffn=3 reaches no part of this model", "hybrid"),
    ("model=ntm model.kv_heads=1", "model.kv_heads=1 reaches no part of this model", "sliding"),
]


@pytest.mark.parametrize(("words", "said", "takers"), IDLE)
def test_a_size_that_was_written_and_that_no_part_takes_is_refused_with_the_parts_that_do(
    words, said, takers
) -> None:
    told = faults(*words.split())
    assert len(told) == 1 and said in told[0] and takers in told[0] and "leave model." in told[0], (
        told
    )


def test_sizes_of_a_recipe_or_of_the_model_to_match_are_no_wishes_of_this_model() -> None:
    for words in (
        "experiment=quickstart mixer=hyena evaluation.sample_tokens=0",
        "model=lstm",
        "mixer=retention model.kv_heads=2 match=flops",  # of full attention, which it is to match
        "mixer=mamba2 model.heads=2 model.ffn=2.0",
        "model=full mixer=sliding mixer.window=8 model.kv_heads=2",
    ):
        assert faults(*words.split()) == [], words


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.full), 5])
def test_sizes_given_to_many_models_leave_out_what_a_model_does_not_take(step: int) -> None:
    common = ["model.width=32", "model.layers=2", "model.heads=4", "++model.kv_heads=2"]
    assert fitting([*common, "mixer=sliding"]) == [*common, "mixer=sliding"]
    assert fitting([*common, "mixer=hyena"]) == [*common[:2], "mixer=hyena"]
    assert fitting([*common, "model=lstm"]) == [*common[:2], "model=lstm"]
    assert fitting([*common, "mixer=hyena", "match=flops"]) == [
        *common,
        "mixer=hyena",
        "match=flops",
    ]
    for name in choices("model")[::step]:
        assert not any(
            "reaches no part" in each for each in faults(*fitting([*common, f"model={name}"]))
        ), name


def test_a_setting_of_an_unknown_group_is_named_as_it_was_written() -> None:
    assert faults("modl.width=3") == [
        "modl.width=3: there is no such setting; did you mean model.width?"
    ]
