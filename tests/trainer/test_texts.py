"""What is typed as text on a command line stays that text, whatever Hydra's grammar would read in
it."""

import random
from typing import Literal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from trainer.config.compose import compose, sweep_words
from trainer.config.node_checks import as_node, node_errors
from trainer.config.schema import Config
from trainer.texts import kind_of, quoted, split, unquoted

TYPED = (
    "2024_11_27",
    "1e3",
    "0x10",
    "true",
    "???",
    "${name}",
    "${x",
    "/x/ünï",
    "/x/lr=0.1",
    "a, b: c",
    "[a",
    "{a:1}",
    "it's",
    'say "x"',
    "def f(a, b):\n    return 'x'\\",
    "\\",
    "~/x",
    "choice(a,b)",
    " a ",
    "@",
    "*",
    "007",
    "1_0",
    "nan",
    "None",
)


def composed(*words: str) -> Config:
    wish = compose(words)
    assert not wish.faults and wish.config is not None
    return wish.config


@pytest.mark.parametrize("typed", TYPED, ids=range(len(TYPED)))
def test_a_text_stays_as_it_was_typed(typed: str) -> None:
    words = (
        "data=hub",
        f"data.name={typed}",
        f"+data.revision={typed}",
        f"run_dir={typed}",
        f"evaluation.prompt={typed}",
    )
    config = composed(
        *words, f"wandb.project={typed}", f"data.split={typed}", f"wandb.tags=[{quoted(typed)},b]"
    )
    data = as_node(config.data)
    assert (data["name"], data["revision"], data["split"]) == (typed,) * 3
    assert (config.run_dir, config.evaluation.prompt, config.wandb.project) == (typed,) * 3
    assert config.wandb.tags == [typed, "b"]
    assert composed(f"evaluation.prompt={quoted(typed)}").evaluation.prompt == typed


def test_null_is_no_text_where_there_may_be_none_and_lists_are_lists_of_texts() -> None:
    config = composed(
        "run_dir=null", "wandb.tags=[2024_11_27, 1e3]", "launch.setup=[module load a/b=c, 'x, y']"
    )
    assert config.run_dir is None and composed("run_dir='null'").run_dir == "null"
    assert config.wandb.tags == ["2024_11_27", "1e3"]
    assert config.launch.setup == ["module load a/b=c", "x, y"]
    assert composed("wandb.tags=[]").wandb.tags == []
    assert composed("name=2024_11_27").name == "2024_11_27"


def test_a_class_that_the_command_names_says_which_of_its_settings_are_texts() -> None:
    words = (
        "data._target_=trainer.data.sources.files.Files",
        "data.path=1_0,2",
        "data.held_out=1e-2",
    )
    data = as_node(composed(*words).data)
    assert data["path"] == "1_0,2" and data["held_out"] == 0.01


def test_what_is_no_text_is_read_as_before_and_judged_by_its_key() -> None:
    assert composed("steps=1_0", "optim.betas=[0.5,0.6]", "parallel.micro_batch=2").optim.betas == (
        0.5,
        0.6,
    )
    assert compose(["steps=1:2,"]).faults == [
        "steps=1:2,: a whole number is needed; for example steps=100"
    ]
    assert "no such setting" in compose(["nonsense=a: b"]).faults[0]
    assert "KEY=VALUE" in compose(["nonsense"]).faults[0]


def test_a_message_shows_the_quoted_form_to_copy() -> None:
    words = ["mixer._target_=tests.trainer.test_texts.Mine", "mixer.anything=a,b"]
    assert "one text is \"mixer.anything='a,b'\"" in compose(words).faults[0]
    assert "one text" not in compose(["steps=3,4"]).faults[0]
    faults: list[str] = []
    sweep_words(["evaluation.prompt=a: b, c[d"], faults)
    assert (
        "write \"evaluation.prompt='a: b, c[d'\" or \"evaluation.prompt='a: b','c[d'\"" in faults[0]
    )


class Mine:
    def __init__(self, anything=None):
        self.anything = anything


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("name=2024_11_27,1e3", ["2024_11_27", "1e3"]),
        ("run_dir=/x/ünï", ["/x/ünï"]),
        ("data.tokenizer=bytes,1e5", ["bytes", "1e5"]),
        ("evaluation.prompt='a, b','c: d'", ["a, b", "c: d"]),
        ("wandb.name=a,null", ["a", None]),
        ("evaluation.prompt=choice(a,b)", ["a", "b"]),
        ("seed=1,2", [1, 2]),
    ],
)
def test_a_sweep_keeps_each_of_its_texts(word: str, values: list[object]) -> None:
    faults: list[str] = []
    read = sweep_words([word], faults)
    if word.startswith("run_dir"):
        assert "hydra.sweep.dir" in faults[0]
        return
    assert faults == []
    (override,) = OverridesParser.create().parse_overrides(read)
    jobs = [
        composed(f"{override.key_or_group}={spelled}")
        for spelled in override.sweep_string_iterator()
    ]
    found = []
    for config in jobs:
        part = as_node(config.data) if word.startswith("data.") else config
        for name in override.key_or_group.split(".")[word.startswith("data.") :]:
            part = part[name] if isinstance(part, dict) else getattr(part, name)
        found.append(part)
    assert found == values


def test_any_text_survives_quotes() -> None:
    draw = random.Random(7)
    for _ in range(300):
        text = "".join(draw.choice("ab'\"\\,:= $[]") for _ in range(draw.randrange(8)))
        assert unquoted(quoted(text)) == text
        assert [unquoted(part) for part in split(f"{quoted(text)},{quoted('x')}")] == [text, "x"]


def test_what_takes_texts() -> None:
    assert kind_of(str | None) == kind_of(Literal["a", "b"]) == "text"
    assert kind_of(list[str]) == kind_of(str | list[str] | None) == "texts"
    assert [
        kind_of(kind) for kind in (str | int, Literal["auto"] | int, bool, float, list[int], None)
    ] == [None] * 6


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["learning_rate=1"], "did you mean optim.learning_rate?"),
        (["every=1"], "did you mean log.every or checkpoint.every or evaluation.every?"),
        (["trainer.steps=1"], "did you mean steps?"),
        (["paralel.contxt=1"], "did you mean parallel.context?"),
        (["evaluation.name=1"], "known: evaluation."),
        (["wandb.cache=1"], "known: wandb."),
    ],
)
def test_an_unknown_key_is_never_taken_for_one_of_another_meaning(
    words: list[str], end: str
) -> None:
    (fault,) = compose(words).faults
    assert end in fault


def test_neither_is_an_unknown_setting_of_a_class() -> None:
    config = composed("data=hub", "data.name=x", "data.cache=1", "data.tokenzier=bytes")
    faults = node_errors(config.data, {}, "data")
    cache = next(fault for fault in faults if fault.startswith("data.cache="))
    assert "did you mean" not in cache and "known: data." in cache
    assert any("did you mean data.tokenizer?" in fault for fault in faults)
