"""Qwen3-Next as first released: older keys, and layers that predict further tokens."""

import pytest

from models.hub.qwen_next import Qwen3Next

RELEASED = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_released_config_is_read_key_by_key():
    found = Qwen3Next().architecture(RELEASED)
    assert found.model["pattern"] == ["delta", "delta", "delta", "full"] * 12
    assert found.model["feedforward_pattern"] == ["experts"] * 48
    assert found.position["rotated_share"] == 0.25 and found.position["theta"] == 1e7
    with pytest.raises(ValueError, match="use_sliding_window=True"):
        Qwen3Next().architecture({**RELEASED, "use_sliding_window": True})


def test_layers_that_predict_further_tokens_are_left_out():
    assert Qwen3Next().is_unused("mtp.layers.0.mlp.gate.weight", RELEASED)
    names = {name for piece in Qwen3Next().pieces(RELEASED) for name in piece.theirs}
    assert not any(Qwen3Next().is_unused(name, RELEASED) for name in names)
    assert "model.layers.47.mlp.experts.511.down_proj.weight" in names
