"""Keys of a config.json that an adapter cannot honour are refused by their name."""

import pytest
import transformers

from models.hub.registry import adapter_of
from tests.support import hub

GPT2 = ("GPT2Config", hub.SMALL_GPT2)
MIXTRAL = ("MixtralConfig", hub.SMALL_MIXTRAL)
OSS = ("GptOssConfig", hub.SMALL_OSS)
DEEPSEEK = ("DeepseekV3Config", hub.SMALL_DEEPSEEK)
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "mscale_all_dim": 1.0}


def content_of(name, settings, changes):
    content = getattr(transformers, name)(**settings).to_diff_dict()
    return {**content, **changes}


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"activation_function": "mish"}, "activation_function='mish'"),
        (GPT2, {"n_positions": 0}, "n_positions=0"),
        (MIXTRAL, {"output_router_logits": True}, "output_router_logits=True"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (OSS, {"swiglu_limit": 0}, "swiglu_limit=0"),
        (OSS, {"layer_types": ["full_attention"]}, "for 2 layers"),
        (DEEPSEEK, {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        (DEEPSEEK, {"topk_method": "greedy"}, "topk_method='greedy'"),
        (DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        (DEEPSEEK, {"n_group": None}, "n_group=None"),
        (DEEPSEEK, {"first_k_dense_replace": -1}, "first_k_dense_replace=-1"),
        (DEEPSEEK, {"rope_parameters": PARTIAL}, "partial_rotary_factor=0.5"),
        (DEEPSEEK, {"rope_parameters": LINEAR}, "mscale_all_dim"),
        (DEEPSEEK, {"index_topk": 64}, "index_topk=64"),
    ],
    ids=str,
)
def test_keys_that_cannot_be_honoured_are_named(kind, changes, message):
    content = content_of(*kind, {})
    adapter_of(content).architecture(content)
    content |= changes
    with pytest.raises(ValueError, match=message):
        adapter_of(content).architecture(content)


def test_layers_that_predict_further_tokens_are_left_out():
    content = content_of(*DEEPSEEK, {"num_nextn_predict_layers": 1})
    adapter = adapter_of(content)
    notes = adapter.architecture(content).notes
    assert any("num_nextn_predict_layers" in note for note in notes)
    assert adapter.is_unused("model.layers.2.eh_proj.weight", content)
    assert not adapter.is_unused("model.layers.1.mlp.gate.weight", content)


def test_gpt_oss_without_rotary_settings_has_those_of_its_release():
    content = content_of(*OSS, {})
    content.pop("rope_parameters")
    position = adapter_of(content).architecture(content).position
    assert position["factor"] == 32 and position["truncate"] is False
    assert position["theta"] == 150_000
