"""longspan.load, build, check and train: from what lies on the disk, and from settings."""

import json

import pytest
import torch

import longspan
from tests.support import hub
from tests.support.torchrun_here import as_only_rank
from tests.trainer.library.test_loaded_model import WORDS
from trainer.export import CONFIG, export

SHORT = (*WORDS, "data=copy", "steps=2", "checkpoint.every=1", "evaluation.every=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, in this process as a rank that torchrun started."""
    directory = tmp_path_factory.mktemp("library") / "run"
    with as_only_rank():
        trained = longspan.train([*SHORT, f"run_dir={directory}"])
    assert not torch.distributed.is_initialized()
    return trained


def test_a_run_tells_its_losses(run):
    assert len(run.losses) == 2
    assert run.metrics[1]["loss"] == run.losses[1]


def test_run_checkpoint_and_export_are_the_same_model(run, tmp_path):
    export(run.directory, tmp_path / "exported")
    newest = run.directory / "checkpoints" / "step_00000002"
    models = [run.load(), longspan.load(str(newest)), longspan.load(tmp_path / "exported")]
    ids = models[0].encode("3 1 2 0")
    for model in models[1:]:
        assert torch.equal(model.logits(ids), models[0].logits(ids))
    first = longspan.load(newest.with_name("step_00000001"))
    assert not torch.equal(first.logits(ids), models[0].logits(ids))


def test_build_begins_where_a_run_begins(run):
    words = [*SHORT[:-3], f"init_from={run.directory}"]
    ids = torch.arange(9)[None]
    assert torch.equal(longspan.build(words).logits(ids), run.load().logits(ids))
    drawn = longspan.build(words[:-1])
    assert torch.equal(drawn.logits(ids), longspan.build(" ".join(words[:-1])).logits(ids))
    other = longspan.build([*words[:-1], "seed=1"])
    assert not torch.allclose(drawn.logits(ids), other.logits(ids))


def test_a_folder_of_hugging_face_is_the_model_of_transformers(tmp_path):
    theirs = hub.make("LlamaConfig", hub.SMALL, tmp_path / "llama")
    for source in (tmp_path / "llama", f"hf:{tmp_path / 'llama'}"):
        ours = longspan.load(source)
        ids = torch.randint(0, hub.WORDS, (2, 11))
        with torch.no_grad():
            expected = theirs.float()(ids).logits
        assert torch.allclose(ours.logits(ids), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"without a tokenizer.json"):
        ours.generate("a")


def test_folders_that_hold_no_model(tmp_path, run):
    for source, message in (
        (tmp_path / "none", "there is no such folder; name a run"),
        (tmp_path, "holds no run, no checkpoint, no export and no Hugging Face model"),
        (run.directory / "checkpoints", "holds no run"),
    ):
        with pytest.raises(longspan.UserError, match=message):
            longspan.load(source)


def test_an_export_of_a_newer_version(run, tmp_path):
    export(run.directory, tmp_path / "exported")
    path = tmp_path / "exported" / CONFIG
    about = json.loads(path.read_text())
    assert about["longspan"] == longspan.__version__
    about["config"]["model"]["_target_"] = "models.of_tomorrow.Model"
    about["longspan"] = "0.99.1"
    path.write_text(json.dumps(about))
    with pytest.raises(longspan.UserError, match=r"was written by Longspan 0.99.1 and cannot be"):
        longspan.load(path.parent)
    about["longspan"] = longspan.__version__
    path.write_text(json.dumps(about))
    with pytest.raises(longspan.UserError, match=r"models.of_tomorrow"):
        longspan.load(path.parent)


def test_check_lists_every_fault_and_starts_nothing():
    assert longspan.check(WORDS) == []
    faults = longspan.check("steps=0 model.widht=3")
    assert len(faults) == 2
    assert any("steps=0: it must be at least 1" in fault for fault in faults)
    assert any("model.widht=3" in fault and "did you mean" in fault for fault in faults)
    assert longspan.check("name='open")[0].startswith("name='open: No closing quotation")


def test_what_cannot_be_trained_from_here():
    for words, message in (
        ("steps=0", "it must be at least 1"),
        ("launch.dry_run=true", "use longspan.check"),
    ):
        with pytest.raises(longspan.UserError, match=message):
            longspan.train([*SHORT, *words.split()])


def test_a_failed_build_says_every_fault():
    with pytest.raises(longspan.UserError, match=r"model\.heads=5"):
        longspan.build([*WORDS, "model.heads=5"])


def test_a_model_takes_ids_without_addresses(run):
    model = run.load()
    ids = model.encode("3 1 2 0")
    with torch.no_grad():
        assert torch.equal(model.module(ids), model.logits(ids))
