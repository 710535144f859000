"""Every script of examples/ does what it says."""

import json
from pathlib import Path

import pytest
import torch

from examples import own_mixer, score_text, shard_a_layer, train_in_python
from tests.support.pool import ranks
from tests.support.torchrun_here import as_only_rank
from trainer.preflight.prepare import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"
TRIED = ("own_mixer", "score_text", "shard_a_layer", "train_in_python")


def test_every_example_is_tried_here():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(TRIED)


def test_a_mixer_of_ones_own_is_causal_and_may_be_shared():
    assert own_mixer.main() == 0.0
    words = ("experiment=quickstart", "mixer._target_=examples.own_mixer.Cosine")
    assert load_config((*words, "parallel.context=2")).parallel.context == 2


def test_the_temperature_of_the_mixer_matters():
    torch.manual_seed(0)
    hidden = torch.randn(1, 10, 32)
    span = own_mixer.Span.line(1, 10)
    layer = own_mixer.Cosine(32, 4)
    before = layer(hidden, span)
    layer.temperature.data *= 2
    assert not torch.allclose(before, layer(hidden, span))


def compared(env):
    return shard_a_layer.compare(env.rank, env.size)


def test_a_layer_on_three_ranks_is_the_layer_on_one():
    for outputs, gradients in ranks(3, compared):
        assert outputs < 1e-12
        assert gradients < 1e-10


@pytest.mark.slow
def test_a_run_is_trained_and_asked(tmp_path):
    with as_only_rank():
        losses = train_in_python.main(tmp_path / "run", "evaluation.every=0", "steps=6")
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    bits = score_text.surprise(tmp_path / "run", "import torch")
    assert len(bits) == len("import torch") - 1
    # Untrained, a byte costs log2(257) bits.
    assert 0 < sum(bits) / len(bits) < 8.01


def test_the_notebook_runs_from_its_first_cell_to_its_last():
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        assert not cell.get("outputs"), "a notebook is kept without its outputs"
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["losses"][-1] < 0.7 * names["losses"][0]
    assert len(names["text"]) > 0
    assert names["faults"]
