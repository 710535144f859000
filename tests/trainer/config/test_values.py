"""Every setting of every node is held against its constructor: types, ranges, finite numbers, sizes
that machines have."""

import copy
import time
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from models.ranges import Range
from trainer.config.compose import compose
from trainer.config.groups import CONF
from trainer.config.node_checks import normalise_node
from trainer.config.schema import Config
from trainer.config.values import breach, quoted_value, settled
from trainer.errors import UserError
from trainer.preflight.check import check_config
from trainer.preflight.check_parts import check_nodes
from trainer.run_dir import plain_config

NAN, ENDLESS = float("nan"), float("inf")
NEVER = (
    NAN,
    ENDLESS,
    -ENDLESS,
    {"a": 1},
    {"_target_": 5},
)  # of no setting that is a number or a truth value
WRONG = {
    bool: (*NEVER, 1, 0, "abc", "true", 1.0, [True]),
    int: (*NEVER, True, "abc", 3.5, 1e30, 10**30, [[1]]),
    float: (*NEVER, True, "abc", 1e300, 1e-300, [[1]]),
    str: (NAN, True, 3, ["a"], {"a": 1}),
}
GROUPS = (
    "mixer",
    "position",
    "memory",
    "data",
    "optim",
    "schedule",
    "model",
    "engine",
    "launch",
    "evaluation",
    "parallel",
)
REAL = ("skip_above", "timeout_s", "init_timeout_s")  # written without a point in conf
SMALL = ("context_length=64", "batch_tokens=128", "model.width=32", "model.layers=2", "data=copy")

OF_TWO_STREAMS = ("encoder_decoder", "seq2seq")  # models that read a source beside the row


def trees() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """For each file of conf: its group, its name and a whole config with it."""
    base = plain_config(compose(SMALL).config)  # pyright: ignore
    for group in GROUPS:
        for path in sorted((CONF / group).glob("*.yaml")):
            node = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(node, dict)
            if "defaults" in node or node.get("name") == "auto":
                continue
            if group == "evaluation":  # a file of it is one node beside the common keys
                node = {**base[group], **node}
            whole = {**copy.deepcopy(base), group: node}
            if path.stem in OF_TWO_STREAMS:
                whole["data"] = OmegaConf.to_container(OmegaConf.load(CONF / "data/reverse.yaml"))
            yield group, path.stem, whole
    for model in ("decoder", "switch", "moe_topk", "hybrid"):
        yield (
            "model",
            model,
            plain_config(compose([*SMALL, f"model={model}"]).config),
        )  # pyright: ignore


def leaves(
    node: dict[str, Any], road: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, (*road, key))
        elif key not in ("_target_", "name") and not (value is None or isinstance(value, list)):
            yield (*road, key), value


def refused(tree: dict[str, Any]) -> bool:
    try:
        for key, node in tree.items():
            if key != "engine":
                normalise_node(node)
        return bool(list(check_nodes(Config.model_validate(tree))))
    except (ValidationError, UserError):
        return True


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)])
def test_every_bad_value_of_every_node_of_conf_is_refused(every: bool) -> None:
    """Without `every` each key tries one of them, and the next key the next."""
    passed, tried, turn = [], 0, 0
    for group, name, tree in trees():
        assert (
            group == "data"
            or not refused(copy.deepcopy(tree))
            or name in ("decoder", "hub", "slurm", "multinode")
        ), (group, name)
        for road, value in leaves(tree[group]):
            wrong = WRONG[float if road[-1] in REAL else type(value)]
            turn += 1
            for bad in wrong if every else [wrong[turn % len(wrong)]]:
                if (group, *road) == ("parallel", "micro_batch") and bad == 3:
                    continue  # "auto", or so many rows
                spoilt = copy.deepcopy(tree)
                place = spoilt[group]
                for key in road[:-1]:
                    place = place[key]
                place[road[-1]] = bad
                tried += 1
                if not refused(spoilt) and not _judged_by_the_data(group, spoilt):
                    passed.append(f"{group}={name} {'.'.join(road)}={bad!r}")
    assert passed == []
    assert tried > (1500 if every else 300)


def _judged_by_the_data(group: str, tree: dict[str, Any]) -> bool:
    return group == "data" and bool(check_config(Config.model_validate(tree)))


@pytest.mark.parametrize(
    ("value", "wanted", "fact"),
    [
        (3, int, None),
        (1e3, int, None),
        (True, int, "whole number"),
        (3.5, int | None, "whole number"),
        (None, int | None, None),
        (None, int, "whole number"),
        (1, bool, "true or false"),
        (3, float, None),
        (NAN, Any, "finite"),
        ([1, NAN], list, None),
        ([1, 2.5], list[int], "whole number"),
        ([1, 2], tuple[float, float], None),
        ([1], tuple[float, float], "a list of 2"),
        ("abc", int | list[int], "whole number is needed or a list"),
        (0, Annotated[int, Range(1)], "at least 1"),
        (0.0, Annotated[float, Range(above=0)] | None, "more than 0"),
        (2**80, int, "at most"),
    ],
)
def test_a_value_is_held_against_an_annotation(value: Any, wanted: Any, fact: str | None) -> None:
    said = breach(value, wanted)
    assert (said is None) == (fact is None), said
    assert fact is None or fact in str(said)


def test_a_whole_float_becomes_a_whole_number_where_one_is_wanted() -> None:
    assert [type(settled(1e3, kind)) for kind in (int, int | None, float, int | float)] == [
        int,
        int,
        float,
        float,
    ]
    made = compose(["mixer=sliding", "mixer.window=1e2"]).config
    assert made is not None and made.mixer is not None
    assert repr(made.mixer.settings()) == "{'window': 100}"


@pytest.mark.parametrize(
    "words",
    [
        "model.layers=1000000",
        "batch_tokens=1e28",
        "batch_tokens=1e13",
        "context_length=1e10 batch_tokens=1e10",
        "launch.timeout_s=1e15",
        "model.width=1e7",
        "model.vocabulary=2000000000 model.width=4096",
        "mixer=hyena mixer.order=1e9",
        "mixer=mamba2 mixer.state=1e10",
        "data=recall data.keys=1e9",
        "memory=segments memory.length=6e10",
    ],
)
def test_sizes_that_no_machine_has_are_refused_quickly(words: str) -> None:
    began = time.process_time()
    asked = compose(words.split())
    faults = (
        asked.faults
        if asked.config is None
        else check_config(asked.config, asked.given, asked.mended, asked.faults)
    )
    assert faults
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "parallel.method=usp parallel.ulysses=8 parallel.ring=1 parallel.context=8",
            "parallel.ulysses=8: query heads are divided among 8 ranks",
        ),
        ("memory=lookup memory.layers=abc", "memory.layers=abc: a list is needed"),
        ("data.cache._target_=5", "data.cache={_target_:5}: a text is needed"),
        ("model._target_=5", "model._target_=5: a text is needed"),
        ("engine._target_=pathlib.Path", "Path is no engine"),
        ("memory=segments memory.name=lookup", "memory.name=lookup"),
        (f"resume={300 * 'a'}", "at most 255 bytes"),
        (f"run_dir={300 * 'a'}", "at most 255 bytes"),
        (f"data.tokenizer={2500 * 'a/'}b", "at most 4095 bytes"),
        ("mixer=[full,sliding]", "choose one mixer, not a list"),
        ("position=null", "one has to be chosen"),
        ("mixer@model.mixers.x=full", "write +mixer@model.mixers.x=NAME"),
        ("+mixer@model.mixers.full=sliding", "write it without +"),
    ],
)
def test_what_ended_in_a_traceback_is_one_message(words: str, said: str) -> None:
    asked = compose(["launch.oversubscribe=true", *words.split()])
    faults = (
        asked.faults
        if asked.config is None
        else check_config(asked.config, asked.given, asked.mended, asked.faults)
    )
    assert len(faults) == 1 and said in faults[0], faults


def test_a_mixer_can_be_added_under_a_label_as_the_message_says() -> None:
    asked = compose(["+mixer@model.mixers.sliding=sliding", "model.pattern=[sliding,full]"])
    assert asked.faults == [] and asked.config is not None
    assert asked.config.model.mixers.keys() == {"full", "sliding"}


def test_a_whole_number_where_a_fraction_may_stand_becomes_one_that_a_tensor_can_meet():
    """Found by the fuzzer: position.amplitude of 26 digits overflowed in the first step."""
    made = settled(10**25, float)
    assert type(made) is float and made == 1e25 and type(settled(True, float)) is bool
    assert (
        breach(10**400, float, "position.amplitude") == "a number that a machine can hold is needed"
    )


def test_a_value_is_shown_as_it_is_written_on_the_command_line() -> None:
    value = {"_target_": "5", "a": [None, True, {"b": 0.5}]}
    assert quoted_value(value) == "{_target_:5,a:[null,true,{b:0.5}]}"
    assert len(quoted_value(list(range(100)))) == 80
