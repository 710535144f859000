"""A run's model leaves as a folder that transformers opens: the same bytes that came in."""

import os

import pytest
import torch
import transformers
from torch.utils._python_dispatch import _disable_current_modes

from models.micro_batch import MicroBatch
from models.span import Span
from scripts.export import main
from tests.support import hub
from tests.support.hub import (
    SMALL,
    SMALL_BERT,
    SMALL_DEEPSEEK,
    SMALL_GPT2,
    SMALL_MAMBA2,
    SMALL_OSS,
)
from tests.support.live import Live
from tests.trainer.verify.test_whole_runs import in_pool
from trainer.config.compose import compose
from trainer.errors import UserError
from trainer.export import export, reopen
from trainer.export_huggingface import export_huggingface, translated
from trainer.init_from.huggingface import read_config
from trainer.preflight.prepare import load_config
from trainer.run_dir import record
from trainer.verify.whole_runs import write_documents

STEADY = (
    "optim.learning_rate=1e-30",
    "optim.weight_decay=0",
    "context_length=128",
    "batch_tokens=256",
    "steps=1",
    "schedule=constant",
    "checkpoint.every=1",
    "evaluation.every=0",
    "wandb.mode=disabled",
    "log.plots=false",
)
QWEN3_NEXT = {
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_only_layers": [1],
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
}
MAMBA2 = {
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 2,
    "use_bias": True,
    "residual_in_fp32": False,
    "time_step_limit": (0.0, 2.0),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model of transformers that two ranks took in, and one that was born here."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    root = tmp_path_factory.mktemp("out")
    settings = {**SMALL, "vocab_size": 300, "bos_token_id": 5, "rope_parameters": LLAMA3}
    hub.make("LlamaConfig", settings, root / "llama")
    data = (
        "data=files",
        f"data.path={write_documents(root / 'text')}",
        f"data.cache={root / 'cache'}",
    )
    words = (*STEADY, *data, "model=hub", f"model.path={root / 'llama'}", "engine=fsdp")
    words = (*words, f"init_from=hf:{root / 'llama'}", "parallel.context=2")
    in_pool((*words, f"run_dir={root / 'run'}"), 2, root / "run")
    record(root / "run", load_config((*words, f"run_dir={root / 'run'}"), started=2))
    small = ("model.width=32", "model.layers=2", "model.heads=4", "++model.kv_heads=2")
    words = (*STEADY, *data, *small, "engine=fsdp", "parallel.data=2", "mixer=sliding")
    words = (*words, "mixer.window=20", f"run_dir={root / 'born'}")
    in_pool(words, 2, root / "born")
    record(root / "born", load_config(words, started=2))
    return root


def test_what_came_in_goes_out_byte_for_byte(runs, tmp_path):
    assert main([str(runs / "run"), str(tmp_path / "out"), "format=huggingface"]) == 0
    for name in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (runs / "llama" / name).read_bytes(), name
    want = transformers.AutoConfig.from_pretrained(runs / "llama").to_dict()
    got = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    assert got.pop("_name_or_path") != want.pop("_name_or_path")
    assert got == want


def test_shards_of_a_chosen_size_open_as_the_same_model(runs, tmp_path):
    words = ["format=huggingface", "max_shard_bytes=20000", "dtype=bfloat16"]
    assert main([str(runs / "run"), str(tmp_path / "out"), *words]) == 0
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 30_000 for shard in shards)
    want = transformers.AutoModelForCausalLM.from_pretrained(runs / "llama", dtype=torch.bfloat16)
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert got.dtype == torch.bfloat16
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A run of one step from a DeepSeek with many experts."""
    root = tmp_path_factory.mktemp("experts")
    settings = {**SMALL_DEEPSEEK, "n_routed_experts": 24, "moe_intermediate_size": 48}
    settings["vocab_size"] = 300
    hub.make("DeepseekV3Config", settings, root / "in")
    words = (*STEADY, "data=copy", "model=hub", f"model.path={root / 'in'}", "engine=single")
    words = (*words, f"init_from=hf:{root / 'in'}", f"run_dir={root / 'run'}")
    in_pool(words, 1, root / "run")
    record(root / "run", load_config(words, started=1))
    return root


def test_an_export_holds_one_shard_at_a_time(experts, tmp_path, monkeypatch):
    from_file = torch.from_file

    def mapped(*words, **settings):
        # Pages of a file are no memory of the process until they are used, and can be dropped.
        with _disable_current_modes():
            return from_file(*words, **settings)

    monkeypatch.setattr(torch, "from_file", mapped)
    total = sum(path.stat().st_size for path in (experts / "in").glob("*.safetensors"))
    most = total // 6
    with Live() as live:
        export_huggingface(experts / "run", tmp_path, max_shard_bytes=most)
    shards = sorted(tmp_path.glob("*.safetensors"))
    largest = 4 * 24 * 48 * 32  # bytes of the experts' largest matrix
    assert len(shards) >= 6 and largest > most / 2
    assert live.peak <= (most + largest) * 1.1, f"{live.peak} of {total} bytes"


def test_a_model_born_here_is_opened_by_transformers(runs, tmp_path):
    export_huggingface(runs / "born", tmp_path / "out")
    export(runs / "born", tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "MistralForCausalLM" and theirs.config.sliding_window == 20
    tokens = torch.randint(0, 257, (1, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = reopen(tmp_path / "ours")(MicroBatch(tokens, Span.line(1, 50)))
        got = theirs(tokens, use_cache=False).logits
    assert ((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("name, settings, words", [
    ("LlamaConfig", {"tie_word_embeddings": True, "mlp_bias": True}, ()),
    ("MistralConfig", {"sliding_window": 9, "head_dim": 12}, ()),
    ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, ()),
    ("Qwen3Config", {"head_dim": 16}, ("position=yarn", "position.factor=4")),
    ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 9}, ()),
    ("Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 9}, ()),
    ("GPT2Config", {"n_inner": 40, "scale_attn_by_inverse_layer_idx": True}, ()),
    ("GPT2Config", {"n_inner": 40, "scale_attn_weights": False}, ()),
    ("Mamba2Config", MAMBA2, ()),
    ("MixtralConfig", {"num_local_experts": 5}, ("++model.feedforwards.experts.balance=0.1",)),
    ("GptOssConfig", {**SMALL_OSS, "attention_bias": False}, ()),
    ("DeepseekV3Config", SMALL_DEEPSEEK, ()),
    ("DeepseekV3Config", {**SMALL_DEEPSEEK, "q_lora_rank": None, "rope_interleave": False}, ()),
    ("Qwen3NextConfig", QWEN3_NEXT, ()),
    ("BertConfig", {"tie_word_embeddings": False, "type_vocab_size": 3}, ()),
    ("BertConfig", {"hidden_act": "relu", "architectures": ["BertModel"]}, ()),
])  # fmt: skip
def test_every_config_comes_back_as_it_went_in(name, settings, words, tmp_path):
    others = {
        "BertConfig": SMALL_BERT,
        "GPT2Config": SMALL_GPT2,
        "Mamba2Config": SMALL_MAMBA2,
    }
    small = others.get(name, SMALL)
    config = getattr(transformers, name)(**{**small, **settings})
    config.save_pretrained(tmp_path)
    run = hub.config_of(tmp_path, *words)
    adapter, content = translated(run, 61, read_config(tmp_path))
    assert adapter.model_type == config.model_type
    again = type(config)(**content).to_dict()
    want = config.to_dict()
    if "position=yarn" in words:
        assert again["rope_parameters"]["rope_type"] == "yarn"
        want["rope_parameters"] = again["rope_parameters"]
        want["max_position_embeddings"] = again["max_position_embeddings"]
    for key in ("architectures", "dtype", "head_dim", "_sliding_window_pattern"):
        want.pop(key, None)
        again.pop(key, None)
    assert again == want


def refused(*words):
    config = compose(["model.width=32", "model.heads=4", "model.layers=2", *words]).config
    with pytest.raises(UserError) as caught:
        translated(config, 257)
    return str(caught.value)


def test_what_has_no_form_in_transformers_is_refused_with_the_nearest():
    text = refused("model=gated_delta")
    assert "the nearest is llama" in text and "GatedDeltaNet, not HubAttention" in text
    assert "transformers has no KeyValue" in refused("model=key_value")
    assert "with memory=segments" in refused("memory=segments", "memory.length=32")
    assert "has no such positions" in refused("position=alibi")
    assert translated(compose(["mixer=full"]).config, 257)[0].model_type == "llama"


def test_wrong_settings_are_one_message(capsys, tmp_path):
    for words, part in (
        (["format=onnx"], "choose one of longspan, huggingface"),
        (["dtype=bfloat16"], "is for format=huggingface"),
        (["format=huggingface", "dtype=int8"], "dtype=int8: choose one of"),
        (["format=huggingface", "max_shard_bytes=none"], "a number of bytes is needed"),
        (["shards=3"], "there is no such setting"),
    ):
        assert main([str(tmp_path), str(tmp_path / "out"), *words]) == 2
        assert part in capsys.readouterr().err
