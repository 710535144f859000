"""Folders of Hugging Face models: what is wrong with one is said in one message, before a rank."""

import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import hub
from tests.support.hub import SMALL, SMALL_GPT2
from trainer.errors import UserError
from trainer.init_from.fit import compare, slots_of
from trainer.init_from.sources import open_weights
from trainer.preflight.prepare import load_config

WORDS = (
    "model=hub",
    "data=copy",
    "context_length=64",
    "batch_tokens=128",
    "wandb.mode=disabled",
    "log.plots=false",
    "evaluation.every=0",
    "steps=1",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llama"
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 300})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(
        folder, max_shard_size="20KB"
    )
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "llama")


def message(folder, *words):
    with pytest.raises(UserError) as caught:
        load_config((*WORDS, f"model.path={folder}", f"init_from=hf:{folder}", *words))
    text = str(caught.value)
    assert "Traceback" not in text
    return text


def edited(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
    return message(folder)


def test_a_good_folder_is_taken_and_its_settings_may_be_changed(folder):
    words = (*WORDS, f"model.path={folder}", f"init_from=hf:{folder}")
    config = load_config((*words, "position=yarn", "position.original_length=64"))
    assert config.model.width == 32 and config.position.target.endswith("Yarn")
    config = load_config((*words, "position.theta=50000"))
    assert config.position.settings()["theta"] == 50_000
    assert load_config((*words, "model.layers=1", "init_from_strict=false")).model.layers == 1


def test_folders_without_what_is_needed(folder, tmp_path):
    assert "there is no folder" in message(tmp_path / "none")
    assert "has no config.json" in message(tmp_path)
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    assert "holds neither model.safetensors nor" in message(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02N.")
    assert "a pickled file can run code" in message(folder)


def test_shards_that_are_missing_cut_off_or_links(folder):
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    raw = first.read_bytes()
    first.write_bytes(raw[: len(raw) // 2])
    assert "cut off or no safetensors file" in message(folder)
    first.unlink()
    assert f"{first.name} is missing" in message(folder)
    first.symlink_to(second)
    assert "symbolic link" in message(folder)


@pytest.fixture
def named(good, tmp_path, monkeypatch):
    """The cache of the hub holds the model team/llama, fetched once; there is no network."""
    place = tmp_path / "hub" / "models--team--llama"
    snapshot = place / "snapshots" / "abc"
    for folder in (place / "blobs", place / "refs", snapshot):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    for number, path in enumerate(sorted(good.iterdir())):
        shutil.copyfile(path, place / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_name_on_the_hub_is_the_folder_in_its_cache(good, named):
    want = open_weights(f"hf:{good}")
    for place in ("team/llama", named):
        words = (*WORDS, f"model.path={place}", f"init_from=hf:{place}")
        assert load_config(words).model.width == 32
        source = open_weights(f"hf:{place}")
        name = "blocks.1.mixer.q.weight"
        assert torch.equal(source.read(name), want.read(name))
    assert "no model of that name can be had" in message("team/other")


def test_a_link_out_of_the_cache_is_refused(named, good):
    first = sorted(named.glob("model-*.safetensors"))[0]
    first.unlink()
    first.symlink_to(good / first.name)
    assert "symbolic link" in message(named)


def test_an_index_that_leads_out_of_the_folder(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../norm.safetensors"
    index.write_text(json.dumps(content))
    assert "'../norm.safetensors', which is no shard" in message(folder)


def test_tensors_that_do_not_fit(folder):
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = torch.zeros(7)
            save_file(tensors, path)
    assert "norm.weight is [7] there and [32] here" in message(folder)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"model_type": "lama"}, "model_type='lama', which no adapter reads; the nearest is llama"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "trust_remote_code), which is never run"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ({"rope_parameters": {"rope_type": "default", "twist": 3}}, "twist=3"),
        ({"a_new_key": 1}, "a_new_key=1, which this adapter does not know"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"num_key_value_heads": 3}, "kv_heads=3"),
    ],
)
def test_keys_that_cannot_be_honoured_are_named(changes, part, folder):
    assert part in edited(folder, **changes)


def test_the_keys_of_older_files_mean_what_they_meant(folder):
    content = json.loads((folder / "config.json").read_text())
    content.pop("rope_parameters")
    content |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(content))
    position = hub.config_of(folder).position
    assert position.target.endswith("Interpolated")
    assert position.settings() == {"factor": 2.0, "theta": 5e5}


def test_a_folder_of_a_model_without_its_head_is_read(tmp_path):
    config = transformers.GPT2Config(**SMALL_GPT2)
    model = transformers.GPT2Model(config)
    # Older files also hold the causal mask.
    tensors = {**model.state_dict(), "h.0.attn.bias": torch.ones(1, 1, 128, 128)}
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_weights(f"hf:{tmp_path}")
    assert compare(source, slots_of(hub.blank(tmp_path))).text() == ""
    assert torch.equal(source.read("blocks.1.mixer.k.bias"), model.h[1].attn.c_attn.bias[32:64])
