"""python -m scripts.generate of models that read a source: the best target of each prompt."""

import io
import json

import pytest
import torch
from safetensors.torch import save_file

from scripts.generate import main
from tests.support.two_streams import roughened
from trainer.config.build_model import build_model
from trainer.config.node_checks import as_node
from trainer.data.sources.base import build_source
from trainer.decoding.command import run
from trainer.decoding.open_model import OpenModel, open_model
from trainer.decoding.targets import alone, sources_of, write_targets
from trainer.decoding.two_streams import BeamSearch, translate
from trainer.errors import UserError
from trainer.export import CONFIG, WEIGHTS
from trainer.preflight.prepare import load_config
from trainer.run_dir import plain_config
from trainer.verify.whole_runs import COMMON

SYMBOLS = 16
PROMPTS = ["3 1 4 1 5", "9 2 6"]
KINDS = {
    "encoder_decoder": ("model=encoder_decoder",),
    "seq2seq": ("model=seq2seq", "model.attention=bahdanau"),
}


def blank(*kind):
    """Returns a small model that was never trained, with weights that make a difference."""
    sizes = [word for word in COMMON if not word.startswith(("model.kv_heads", "model.heads"))]
    words = [*kind, "data=reverse", *sizes, "evaluation.sample_tokens=0"]
    config = load_config(words, started=1)
    model = build_model(config, SYMBOLS + 1)
    # Targets of a blank model hardly depend on their source.
    roughened(model, torch.float32).eval()
    return OpenModel(model, build_source(as_node(config.data)).tokenizer(), config)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """An exported folder of such a model."""
    folder = tmp_path_factory.mktemp(request.param)
    opened = blank(*KINDS[request.param])
    weights = {name: tensor.clone() for name, tensor in opened.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    about = {"step": 0, "vocabulary": SYMBOLS + 1, "config": plain_config(opened.config)}
    (folder / CONFIG).write_text(json.dumps(about))
    return folder


def said(*words) -> str:
    screen = io.StringIO()
    assert run([str(word) for word in words], screen) == 0
    return screen.getvalue()


def expected(folder, prompt, **settings):
    """The target of a prompt by the search itself."""
    opened = open_model(folder)
    source = [*map(int, prompt.split()), SYMBOLS]
    search = BeamSearch(SYMBOLS, SYMBOLS, **settings)
    return translate(opened.model, alone("cpu"), [source], search)[0]


def test_a_prompt_is_the_source_and_the_best_target_goes_to_the_screen(exported):
    greedy = said(exported, f"prompt={PROMPTS[0]}", "tokens=6")
    assert [int(word) for word in greedy.split()] == expected(exported, PROMPTS[0], most=6).tokens
    wide = said(exported, f"prompt={PROMPTS[0]}", "tokens=6", "beams=4", "length_penalty=0.6")
    best = expected(exported, PROMPTS[0], most=6, beams=4, length_penalty=0.6)
    assert [int(word) for word in wide.split()] == best.tokens
    assert greedy != said(exported, f"prompt={PROMPTS[1]}", "tokens=6")


def test_a_file_of_prompts_becomes_lines_of_json(exported, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    output = tmp_path / "targets.jsonl"
    words = f"prompts={prompts}", f"output={output}", "tokens=5", "beams=2"
    assert said(exported, *words) == ""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt_text"] for line in lines] == PROMPTS
    for number, line in enumerate(lines):
        best = expected(exported, PROMPTS[number], most=5, beams=2)
        assert line["prompt"] == number
        assert [int(word) for word in line["text"].split()] == best.tokens
        assert line["rating"] == pytest.approx(best.rating)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["beams=0"], "beams=0"),
        (["beams=18"], "beams=18"),
        (["length_penalty=-1"], "length_penalty=-1"),
        (["temperature=0.5"], "temperature=0.5 means nothing"),
        (["samples=2"], "samples=2 means nothing"),
        (["cache=paged"], "cache=paged means nothing"),
        (["cache.block=4"], "cache.block=4 means nothing"),
        (["prompt=3 x"], "prompt=3 x: 'x' is no token"),
        (["device=nowhere"], "device=nowhere"),
    ],
)
def test_each_mistake_gives_one_message(exported, words, message, capsys):
    given = [] if words[0].startswith("prompt=") else ["prompt=1 2"]
    assert main([str(exported), *given, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.count("\n") == 1


def test_a_source_or_a_target_beyond_the_positions_is_refused():
    opened = blank("model=encoder_decoder", "position=learned")
    longest = opened.config.context_length
    assert sources_of(opened, ["1 " * (longest - 1)])
    with pytest.raises(UserError, match=f"{longest + 1} tokens with its end, but the model takes"):
        sources_of(opened, ["1 " * longest])
    screen = io.StringIO()
    with pytest.raises(UserError, match=f"tokens={longest + 1}: the model takes {longest} in a"):
        write_targets(opened, ["1 2"], {"tokens": longest + 1}, None, screen)
    write_targets(opened, ["1 2"], {}, None, screen)
    assert len(screen.getvalue().split()) <= longest
