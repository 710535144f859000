"""Models that are no decoders and data that is a task: what they have no place for is refused, the
rest passes the check."""

import re

import pytest

from trainer.config.compose import compose
from trainer.preflight.check import check_config

COPY = ("model=ntm", "data=copy", "context_length=41", "batch_tokens=82")
FACTS = ("model=key_value", "data=facts", "context_length=42", "batch_tokens=84")
SOURCE = ("model=encoder_decoder", "data=reverse", "data.source_length=64", "context_length=32")
TASKS = ("copy", "repeat_copy", "associative", "sort", "facts", "retrieval")


def faults(*words: str) -> list[str]:
    asked = compose(list(words))
    return (
        asked.faults
        if asked.config is None
        else check_config(asked.config, asked.given, asked.mended, asked.faults)
    )


@pytest.mark.parametrize("model", ["ntm", "lstm", "key_value", "full"])
@pytest.mark.parametrize("data", TASKS)
def test_every_task_can_be_given_to_every_model(model: str, data: str) -> None:
    assert faults(f"model={model}", f"data={data}", "context_length=128", "batch_tokens=128") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            (*COPY, "mixer=full"),
            "mixer: is set, but NeuralTuringMachine takes no mixers; leave mixer out",
        ),
        (
            (*COPY, "model.pattern=[full]"),
            "model.pattern: is set, but NeuralTuringMachine takes no mixers",
        ),
        (
            (*COPY, "model.feedforward={_target_: models.feedforward.SwiGLU}"),
            "model.feedforward: is set, but NeuralTuringMachine takes no",
        ),
        ((*COPY, "position=alibi"), "nothing in this model takes a position"),
        (
            (*COPY, "memory=lookup"),
            "NeuralTuringMachine carries a state of its own .* use memory=segments memory.length=0",
        ),
        ((*FACTS, "memory=segments"), "memory=segments: KeyValue takes no memory"),
        (
            (*COPY, "engine.checkpointing=full"),
            "engine.checkpointing=full: computes blocks again, and NeuralTuringMachine has none",
        ),
        (
            (*COPY, "engine.offload_activations=true", "launch=slurm", "launch.dry_run=true"),
            "sends away what blocks save, and NeuralTuringMachine has none",
        ),
        (
            (*COPY, "engine.tile_tokens=64"),
            "engine.tile_tokens=64: .* NeuralTuringMachine has no blocks with one",
        ),
        (
            ("model=moe_topk", "log.lag=1"),
            r"log.lag=1: blocks\..* has a state that the statistics of a step may .* log.lag=0",
        ),
        (("mixer=gated_delta", "engine.head_groups=2"), "engine.head_groups=2: .* no layer is of"),
        (
            ("model.heads=4", "engine.head_groups=3"),
            "engine.head_groups=3: 4 heads do not divide into 3 groups; choose a number",
        ),
        (
            (*FACTS, "engine.compile=true"),
            "engine.compile=true: compiles blocks, and KeyValue has none",
        ),
        (
            (*COPY, "context_length=40", "batch_tokens=80"),
            "the longest example of CopyTask takes 41; use context_length=41",
        ),
        (
            (*COPY, "evaluation.sample_tokens=5"),
            "the answers of CopyTask are not next tokens; use evaluation.sample_tokens=0",
        ),
        (
            (*FACTS, "evaluation.sample_tokens=5", "evaluation.prompt=def"),
            "evaluation.prompt=def: 'def' is no token of this task",
        ),
        (
            (*COPY, "data.max_lenght=3"),
            r"data.max_lenght=3: CopyTask has no such setting; did you mean data.max_length\?",
        ),
        ((*COPY, "model.controller=gru"), "unknown controller=gru"),
        ((*COPY, "parallel.context=2", "parallel.method=ulysses"), "needs 2 query heads"),
        ((*COPY, "data.held_out=0"), "data.held_out=0: keeps nothing to evaluate on"),
        (
            (*SOURCE, "batch_tokens=64", "position=learned", "position.max_length=32"),
            "position.max_length=32: a row of 64 tokens, or of a source, is longer; .*=64 or more",
        ),
    ],
)
def test_what_there_is_no_place_for_is_refused(words: tuple[str, ...], said: str) -> None:
    found = faults(*words)
    assert len(found) == 1 and re.search(said, found[0]), found


def test_layers_that_only_tell_figures_may_lag() -> None:
    assert faults("model=switch", "log.lag=1") == []


def test_a_state_of_its_own_is_carried_by_the_memory_that_asks_for_nothing_else() -> None:
    assert faults(*COPY, "memory=segments", "memory.length=0") == []
    longer = faults(
        *COPY, "context_length=10", "batch_tokens=20", "memory=segments", "memory.length=0"
    )
    assert longer == [], "an example may be longer than a row where rows go on"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cache=h2o", "mixer=latent"), "cache=h2o chooses tokens for each key head"),
        (("cache=snapkv", "position=alibi"), "cache=snapkv chooses tokens for each key head"),
        (("cache=tova", "mixer=gated_delta"), "cache=tova evicts keys and values, and no layer"),
        (("cache=quantized", "mixer=latent"), "holds latents or other tensors"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_where_a_run_generates(words, said) -> None:
    found = faults(*words, "evaluation.sample_tokens=5", "evaluation.prompt=def")
    assert found and all(re.search(said, each) for each in found), found
    # A run that generates nothing has no use for its cache.
    assert faults(*words, "evaluation.sample_tokens=0") == []
    assert faults(*words, "evaluation.every=0") == []
