"""python -m scripts.generate: what it writes, and one message for each mistake."""

import io
import json

import pytest
import torch
from safetensors.torch import save_file

from models.init import initialise
from scripts.generate import main
from trainer.config.build_model import build_model
from trainer.decoding.command import run
from trainer.errors import UserError
from trainer.export import CONFIG, WEIGHTS
from trainer.preflight.prepare import load_config
from trainer.run_dir import plain_config
from trainer.verify.whole_runs import COMMON, write_documents


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported folder of a small model that was never trained."""
    folder = tmp_path_factory.mktemp("exported")
    text = write_documents(folder / "text")
    config = load_config([*COMMON, "data=files", f"data.path={text}"], started=1)
    model = initialise(build_model(config, 257), config.seed)
    save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / WEIGHTS)
    about = {"step": 0, "vocabulary": 257, "config": plain_config(config)}
    (folder / CONFIG).write_text(json.dumps(about))
    return folder


def said(*words) -> str:
    screen = io.StringIO()
    assert run([str(word) for word in words], screen) == 0
    return screen.getvalue()


def test_one_text_goes_to_the_screen_as_it_comes(exported, capsys):
    first = said(exported, "prompt=the ", "tokens=12", "seed=3")
    assert first.startswith("the ") and len(first) > 4
    assert first == said(exported, "prompt=the ", "tokens=12", "seed=3", "cache.block=4")
    assert first != said(exported, "prompt=the ", "tokens=12", "seed=4")
    figures = capsys.readouterr().err
    assert "tokens/s" in figures and "cache: " in figures


def test_a_file_of_prompts_becomes_lines_of_json(exported, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('one\n{"prompt": "two\\nlines"}\n')
    output = tmp_path / "texts.jsonl"
    words = f"prompts={prompts}", f"output={output}", "tokens=5", "samples=2", "temperature=0"
    assert said(exported, *words) == ""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted((line["prompt"], line["sample"]) for line in lines) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert {line["prompt_text"] for line in lines} == {"one", "two\nlines"}
    # Two samples of the likeliest tokens are the same text.
    assert len({line["text"] for line in lines if line["prompt"] == 0}) == 1
    with pytest.raises(UserError, match="is there already"):
        said(exported, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokens=0"], "tokens=0"),
        (["tokens=many"], "tokens=many is not of the kind int"),
        (["word=3"], "unknown word=3"),
        (["temperature=-1"], "temperature=-1"),
        (["temperature=.nan"], "temperature=.nan is not"),
        (["cache=none"], "unknown cache=none"),
        (["cache.block=0"], "cache.block=0"),
        (["cache.blocks=4"], "blocks"),
        (["rows=0"], "rows=0"),
        (["samples=0"], "samples=0"),
        (["device=nowhere"], "device=nowhere"),
        (["prompt=a", "prompts=b"], "both"),
        (["prompts=missing.txt"], "missing.txt"),
    ],
)
def test_each_mistake_gives_one_message(exported, words, message, capsys):
    assert main([str(exported), *words]) in (2, 3)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err
    (tmp_path / CONFIG).write_text("{}")
    assert main([str(tmp_path)]) == 3
    assert "export it again" in capsys.readouterr().err
    assert main([]) == 2
    assert torch.is_grad_enabled()
