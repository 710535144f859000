"""A layer that is not ours is tried on a tiny twin: what mixes tokens by itself is not shared, what
leaks is not trained."""

import importlib
import re
import time
from pathlib import Path

import pytest

from trainer.config.compose import compose
from trainer.preflight.check import check_config

SMALL = (
    "context_length=64",
    "batch_tokens=128",
    "model.width=32",
    "model.layers=2",
    "launch.oversubscribe=true",
)
ITSELF, DOCUMENTS, LATER = "mixes tokens by itself", "learn of another", "come after them"


def faults(*words: str) -> list[str]:
    asked = compose([*SMALL, *words])
    return (
        asked.faults
        if asked.config is None
        else check_config(asked.config, asked.given, asked.mended, asked.faults)
    )


def mixer(name: str) -> tuple[str, str]:
    return "mixer=full", f"mixer._target_=tests.trainer.leaking.{name}"


@pytest.mark.parametrize(
    ("name", "alone", "shared"),
    [
        ("PlainAttention", [DOCUMENTS], [ITSELF, DOCUMENTS]),
        ("Careful", [], [ITSELF]),
        ("Recurrent", [DOCUMENTS], [ITSELF, DOCUMENTS]),
        ("Ahead", [DOCUMENTS, LATER], [ITSELF, DOCUMENTS, LATER]),
        ("Scaled", [], []),
    ],
)
def test_what_mixes_tokens_by_itself_or_leaks_is_refused(
    name: str, alone: list[str], shared: list[str]
) -> None:
    began = time.process_time()
    for words, wanted in ((("parallel.context=1",), alone), (("parallel.context=2",), shared)):
        told = faults(*mixer(name), *words)
        assert len(told) == len(wanted), told
        for said, line in zip(wanted, told, strict=True):
            assert said in line and name in line and "primitive" in line
    assert time.process_time() - began < 20


def test_a_leak_is_trained_where_that_is_asked_for_and_nothing_is_shared() -> None:
    assert faults(*mixer("Recurrent"), "model.allow_leaks=true") == []
    assert faults(*mixer("Recurrent"), "model.allow_leaks=true", "parallel.context=2") != []


def test_feedforward_layers_are_tried_too() -> None:
    word = "model.feedforward={_target_: tests.trainer.leaking.Centred}"
    assert re.search(
        "Centred mixes tokens by itself", "\n".join(faults(word, "parallel.context=2"))
    )
    assert (
        faults("model.feedforward={_target_: tests.trainer.leaking.Local}", "parallel.context=2")
        == []
    )


def test_what_cannot_be_tried_is_said_so() -> None:
    told = faults(
        *mixer("Careful"),
        "model.feedforward={_target_: torch.nn.LSTMCell, input_size: 3, hidden_size: 3}",
    )
    assert (
        len(told) == 1 and "could not be tried" in told[0] and "model.allow_leaks=true" in told[0]
    )


def test_the_page_that_a_message_names_is_there_and_its_layer_can_be_shared(
    tmp_path: Path, monkeypatch
) -> None:
    [told] = faults(*mixer("Careful"), "parallel.context=2")
    named = re.search(r"read (\S+\.md)", told)
    assert named is not None, told
    page = (Path(__file__).parents[3] / named[1]).read_text("utf-8")
    code = page.split("```python\n")[1].partition("```")[0]
    (tmp_path / "averaged_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("mixer=full", "mixer._target_=averaged_of_the_page.Averaged", "+mixer.temperature=2.0")
    assert faults(*words, "parallel.context=2") == []
    for primitive in re.findall(r"`(models\.mixing\.[a-z]+)\.([A-Z]\w+)", page):
        assert hasattr(importlib.import_module(primitive[0]), primitive[1]), primitive


@pytest.mark.parametrize(
    ("name", "engine", "refused"),
    [
        ("Branching", "deepspeed", True),
        ("Branching", "fsdp", False),
        ("SingleOnly", "deepspeed", True),
        ("Tied", "deepspeed", False),
        ("Scaled", "deepspeed", False),
    ],
)
def test_what_uses_other_parameters_for_other_rows_is_refused_under_deepspeed(
    name: str, engine: str, refused: bool
) -> None:
    words = (f"engine={engine}", "parallel.data=2", "precision=float32")
    told = faults(*mixer(name), *words)
    assert len(told) == refused, told
    for line in told:
        assert line.startswith("engine=deepspeed: whether ") and "mixer.second" in line
        assert f"of {name} is used depends on the rows" in line and "same_graph.tied" in line


def test_what_cannot_be_tried_on_unlike_rows_is_refused_under_deepspeed() -> None:
    words = ("parallel.data=2", "precision=float32")
    (told,) = faults(*mixer("Choking"), "engine=deepspeed", *words)
    assert (
        "Choking could not be tried on unlike rows (ValueError: there is nothing to read)" in told
    )
    assert faults(*mixer("Choking"), "engine=fsdp", *words) == []
