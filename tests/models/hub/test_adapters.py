"""Every adapter against transformers itself: logits, losses, gradients, ranks, and its own inverse.

transformers computes norms and rotary angles in float32 also where a model is in float64, so two
equal models differ by a few 1e-7 here.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models.hub.registry import adapter_of
from models.micro_batch import MicroBatch
from tests.support import hub
from tests.support.hub import (
    SMALL,
    SMALL_DEEPSEEK,
    SMALL_GPT2,
    SMALL_MAMBA2,
    SMALL_MIXTRAL,
    SMALL_OSS,
    YARN,
)
from tests.support.parity import relative
from tests.support.pool import ranks
from trainer.init_from.huggingface import read_config
from trainer.init_from.sources import open_weights

CLOSE = 1e-5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
UPPER = {"max_window_layers": 1}
WINDOW = {"sliding_window": 9}
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 20,
    "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 4.0,
}
DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_only_layers": [1],
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}
STEPS = {"time_step_limit": (0.3, 1.1), "use_bias": True, "n_groups": 2}
PLAIN_DEEPSEEK = {
    "attention_bias": False,
    "q_lora_rank": None,
    "rope_interleave": False,
    "norm_topk_prob": False,
    "first_k_dense_replace": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000.0},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama_3.1": ("LlamaConfig", {**SMALL, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": 9, "head_dim": 12}),
    "qwen2": ("Qwen2Config", {**SMALL, **WINDOW, "use_sliding_window": True, **UPPER}),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 16, "rope_parameters": YARN}),
    "gemma2": ("Gemma2Config", {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 20, **WINDOW}),
    "gemma3": ("Gemma3TextConfig", {**SMALL, **GEMMA3, **WINDOW}),
    "gpt2": ("GPT2Config", {**SMALL_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "mamba2": ("Mamba2Config", {**SMALL_MAMBA2, "n_groups": 1, "use_conv_bias": False}),
    "qwen3_next": ("Qwen3NextConfig", {**SMALL, **DELTA, "attention_bias": True}),
    "mamba2_groups": ("Mamba2Config", {**SMALL_MAMBA2, **STEPS, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", SMALL_MIXTRAL),
    "gpt_oss": ("GptOssConfig", SMALL_OSS),
    "deepseek_v3": ("DeepseekV3Config", SMALL_DEEPSEEK),
    "deepseek_v3 plain": ("DeepseekV3Config", {**SMALL_DEEPSEEK, **PLAIN_DEEPSEEK}),
}
SHARED = {
    "llama": "ring",
    "llama_3.1": "ulysses",
    "gemma2": "allgather",
    "gemma3": "ring",
    "gpt2": "ulysses",
    "mamba2_groups": "ring",
    "qwen3_next": "ring",
    "mixtral": "allgather",
    "gpt_oss": "ring",
    "deepseek_v3": "ring",
}
MORE_SHARED = {  # close to one of the others
    "mistral": "ring",
    "qwen2": "allgather",
    "qwen3": "ulysses",
    "mamba2": "allgather",
    "deepseek_v3 plain": "allgather",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, the model of transformers, ours) by the name of the case, made once."""
    root = tmp_path_factory.mktemp("hub")

    @cache
    def build(case):
        theirs = hub.make(*CASES[case], root / case)
        return root / case, theirs, hub.ours(root / case)

    return build


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_give_the_logits_losses_and_gradients_of_transformers(case, made):
    folder, theirs, ours = made(case)
    tokens, span, targets = hub.rows()
    logits = ours(MicroBatch(tokens, span)).detach()
    theirs.zero_grad()
    total = 0.0
    for row, here, document in hub.documents():
        want = theirs(document, use_cache=False).logits
        assert relative(logits[row : row + 1, here], want.detach()) < CLOSE
        if document.shape[1] > 1:
            loss = F.cross_entropy(want[0, :-1], document[0, 1:], reduction="sum")
            loss.backward()
            total += loss.item()
    ours.zero_grad()
    losses = ours(MicroBatch(tokens, span, targets))
    losses.sum().backward()
    assert losses.sum().item() == pytest.approx(total, rel=CLOSE)
    assert hub.worst(hub.gradients(ours), hub.their_gradients(theirs, folder)) < CLOSE


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "case", [*SHARED, *(pytest.param(case, marks=pytest.mark.full) for case in MORE_SHARED)]
)
def test_ranks_that_share_a_row_give_the_same(case, size, made):
    folder, _, ours = made(case)
    tokens, span, targets = hub.rows()
    ours.zero_grad()
    loss = ours(MicroBatch(tokens, span, targets)).sum() / (targets >= 0).sum()
    loss.backward()
    want = hub.gradients(ours)
    method = {**SHARED, **MORE_SHARED}[case]
    for got, gradients in ranks(size, hub.on_ranks, str(folder), method):
        assert got == pytest.approx(loss.item(), rel=1e-9)
        assert hub.worst(gradients, want) < 1e-8


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_bit_for_bit(case, made):
    folder, _, _ = made(case)
    content = read_config(folder)
    source = open_weights(f"hf:{folder}")
    seen = set()
    for piece in adapter_of(content).pieces(content):
        back = piece.write([source.read(name) for name in piece.ours])
        for name, tensor in zip(piece.theirs, back, strict=True):
            assert torch.equal(tensor, source.read_theirs(name))
            seen.add(name)
    assert seen == set(source.files)
