"""init_from= takes weights and nothing else: of a run, a checkpoint or an export, on any ranks."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.feedforward import SwiGLU
from models.positions.rope import Rope
from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.mesh import build_mesh
from tests.support import hub
from tests.support.live import Live, everything, storages
from tests.support.pool import ranks
from tests.trainer.verify.test_whole_runs import in_pool
from trainer.checkpoint.reader import CheckpointReader
from trainer.errors import UserError
from trainer.export import export
from trainer.init_from.fit import compare, slots_of
from trainer.init_from.load import load_initial_weights
from trainer.init_from.sources import open_weights
from trainer.logs.jsonl import METRICS, read
from trainer.optim.adamw import AdamW
from trainer.preflight.prepare import load_config
from trainer.run_dir import record
from trainer.verify.whole_runs import COMMON, write_documents

ENGINES = {"single": Single, "fsdp": Fsdp}
WORDS = (*COMMON, "steps=2", "checkpoint.every=2", "precision=float64")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of two ranks, its data, and its export."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = tmp_path_factory.mktemp("init_from")
    data = (
        "data=files",
        f"data.path={write_documents(folder / 'text')}",
        f"data.cache={folder / 'cache'}",
    )
    words = (*WORDS, *data, "engine=fsdp", "parallel.data=2", f"run_dir={folder / 'run'}")
    in_pool(words, 2, folder / "run")
    record(folder / "run", load_config(words, started=2))
    export(folder / "run", folder / "export")
    return folder, data


def stored(run: Path) -> dict[str, torch.Tensor]:
    archive = CheckpointReader(run / "checkpoints", say=lambda line: None)
    place = archive.latest()
    assert place is not None
    return archive.load(place, {"model": archive.blank(place, "model")}).state["model"]


def loaded(env, name, words):
    """The weights of an engine after init_from, whole, and the lines of the log."""
    config = load_config(words, started=env.size)
    with torch.device("meta"):
        model = small()
    slots = slots_of(model)
    engine = ENGINES[name](build_mesh(1, env.size), AdamW(1e-3), precision="float64", seed=5)
    engine.wrap(model)
    lines: list[str] = []
    load_initial_weights(config, engine, slots, lines.append)
    whole = {}
    for key, tensor in engine.model.state_dict().items():
        whole[key] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    moments = [state["exp_avg"] for state in engine.optimiser.state.values()]
    assert not any(bool(getattr(m, "to_local", lambda m=m: m)().any()) for m in moments)
    return whole, lines


def small(words: int = 257, layers: int = 2) -> Decoder:
    mixers = [Attention(32, 4, 2, Rope()) for _ in range(layers)]
    return Decoder(words, 32, mixers, [SwiGLU(32, 88) for _ in range(layers)], tie_embeddings=True)


@pytest.mark.parametrize("kind", ["run", "run/checkpoints/step_00000002", "export"])
@pytest.mark.parametrize(("name", "size"), [("single", 1), ("fsdp", 3)])
def test_every_kind_of_source_gives_its_weights_bit_for_bit(source, kind, name, size):
    folder, data = source
    words = (*WORDS, *data, f"engine={name}", f"parallel.data={size}", f"init_from={folder / kind}")
    words = (*words, "batch_tokens=1530")
    want = stored(folder / "run")
    for whole, lines in ranks(size, loaded, name, words):
        assert whole.keys() == want.keys()
        assert all(torch.equal(whole[key], want[key]) for key in want)
        assert "tensors from" in lines[-1]


def test_a_run_begins_anew_from_the_weights_of_another(source, tmp_path):
    folder, data = source
    words = (*WORDS, *data, f"init_from={folder / 'run'}", "parallel.context=3", "engine=fsdp")
    words = (*words, "optim.learning_rate=1e-30", "optim.weight_decay=0")
    in_pool((*words, f"run_dir={tmp_path / 'next'}"), 3, tmp_path / "next")
    rows = list(read(tmp_path / "next" / METRICS))
    assert [row["step"] for row in rows] == [1, 2]
    want = stored(folder / "run")
    got = stored(tmp_path / "next")
    assert max((got[name] - want[name]).abs().max().item() for name in want) < 1e-20


def messages(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(words)
    return str(caught.value)


def test_what_does_not_fit_is_listed_and_refused(source):
    folder, data = source
    words = (*WORDS, *data, f"init_from={folder / 'run'}", "model.layers=3", "model.ffn=40")
    text = messages(*words, "model.tie_embeddings=true")
    assert text.startswith(f"init_from={folder / 'run'}: 6 of another shape: blocks.0.feedforward")
    assert "9 missing there: blocks.2.mixer_norm.weight" in text
    assert "init_from_strict=false" in text
    assert "left over" not in text
    assert "left over" in messages(*WORDS, *data, f"init_from={folder / 'run'}", "model.layers=1")
    assert load_config((*words, "init_from_strict=false")).model.layers == 3


def test_what_may_differ_starts_as_without_init_from(source):
    folder, _ = source
    fit = compare(open_weights(str(folder / "run")), slots_of(small(layers=3)))
    assert [name for name in fit.missing if not name.startswith("blocks.2.")] == []
    assert len(fit.fitting) == 20


def test_other_faults_are_one_message_each(source, tmp_path):
    folder, data = source
    words = (*WORDS, *data)
    assert "there is no such folder" in messages(*words, f"init_from={tmp_path / 'none'}")
    assert "holds no run, no checkpoint" in messages(*words, f"init_from={tmp_path}")
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"\x80\x02N.")
    assert "a pickled file can run code" in messages(*words, f"init_from={pickled}")
    both = messages(*words, f"init_from={folder / 'run'}", f"resume={folder / 'run'}")
    assert "leave one of the two out" in both
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(folder / "export" / "model.safetensors")
    (linked / "config.json").write_text("{}")
    assert "symbolic link" in messages(*words, f"init_from={linked}")
    cut = tmp_path / "cut"
    cut.mkdir()
    raw = (folder / "export" / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    (cut / "config.json").write_text("{}")
    assert "cut off or no safetensors file" in messages(*words, f"init_from={cut}")


def test_ties_that_the_weights_do_not_have_are_refused(source, tmp_path):
    class Untied:
        about = "two tensors"
        ties = {}
        shapes = {name: tensor.shape for name, tensor in small().state_dict().items()}

        def read(self, name):
            return torch.full(self.shapes[name], float(name == "head.weight"))

    assert compare(Untied(), slots_of(small())).torn == ["head.weight and embed.weight"]


def peak_of(env, folder):
    """(most bytes alive beside what the engine held before, largest tensor, all tensors)."""
    if folder.startswith("hf:"):
        model = hub.blank(folder.removeprefix("hf:"))
    else:
        with torch.device("meta"):
            model = small(1031)
    slots = slots_of(model)
    source = open_weights(folder)
    sizes = [torch.Size(shape).numel() * 8 for shape in source.shapes.values()]
    engine = Fsdp(build_mesh(1, env.size), AdamW(1e-3), precision="float64", seed=5)
    before = everything()
    engine.wrap(model)
    held = storages(engine.parameters.values())
    fit = compare(source, slots)
    with Live() as live:
        engine.load_weights((name, source.read(name)) for name in fit.fitting)
    del before
    return held + live.peak, max(sizes), sum(sizes)


def test_no_rank_holds_more_than_its_part_and_one_tensor(tmp_path):
    model = small(1031).double()
    state = {name: t.detach() for name, t in model.state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for peak, largest, total in ranks(4, peak_of, str(tmp_path)):
        assert peak <= (total / 4 + largest) * 1.1, f"{peak} of {total} bytes"


def test_so_with_experts_that_lie_singly_in_a_folder_of_transformers(tmp_path):
    settings = {**hub.SMALL_MIXTRAL, "num_local_experts": 16, "num_hidden_layers": 4}
    config = transformers.MixtralConfig(**settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for peak, largest, total in ranks(4, peak_of, f"hf:{tmp_path}"):
        assert peak <= (total / 4 + largest) * 1.1, f"{peak} of {total} bytes"
