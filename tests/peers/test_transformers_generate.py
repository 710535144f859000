"""Greedy tokens equal those of transformers' `generate` and `generate_batch` with the same weights,
200 of them, float32."""

import pytest
import torch
import transformers

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.carried_state import name_stateful_modules
from models.feedforward import SwiGLU
from models.hub.mamba import VECTORS
from models.positions.rope import Rope
from models.recurrent.mamba2 import Mamba2
from scripts.benchmarks.decode import PARTS, VOCABULARY, peers_greedy, twins
from tests.support import hub
from trainer.decoding.scheduler import Scheduler, TextRequest

PROMPTS = (7, 23, 40)
TOKENS = 200


def prompts(words=VOCABULARY):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, words, (length,), generator=generator) for length in PROMPTS]


def texts(model, given):
    """What the rows go on with, all of them in one batch."""
    scheduler = Scheduler(model, rows=len(given))
    requests = [TextRequest(prompt.tolist(), TOKENS) for prompt in given]
    for request in requests:
        scheduler.submit(request)
    list(scheduler.run())
    return [request.tokens for request in requests]


def equal(theirs, ours, given):
    """Compares each prompt with their `generate`, one at a time."""
    found = texts(ours, given)
    for tokens, prompt in zip(found, given, strict=True):
        assert tokens == peers_greedy(theirs, prompt[None], TOKENS)[0].tolist()
    return found


@pytest.mark.short("None")
@pytest.mark.parametrize("window", [None, 16])
def test_tokens_of_uneven_prompts(window):
    theirs, ours = twins(32, 2, 4, 2, window=window)
    equal(theirs, ours, prompts())


@pytest.mark.short("None")
@pytest.mark.parametrize("window", [None, 16])
def test_tokens_of_their_continuous_batching(window):
    theirs, ours = twins(32, 2, 4, 2, window=window)
    given = prompts()
    settings = transformers.GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = transformers.ContinuousBatchingConfig(
        page_size=16, num_blocks=64, max_batch_tokens=128
    )
    results = theirs.generate_batch(
        [prompt.tolist() for prompt in given],
        generation_config=settings,
        continuous_batching_config=batching,
    )
    assert len(results) == len(given)
    for tokens, result in zip(texts(ours, given), results.values(), strict=True):
        assert len(tokens) == TOKENS
        assert result.generated_tokens == tokens


def hybrid():
    """A Bamba, Mamba-2 with attention in its second layer, and ours with its weights."""
    config = transformers.BambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_n_groups=2,
        mamba_d_state=8,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(3)
    theirs = transformers.BambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)

    def recurrent():
        return Mamba2(32, 4, state=8, groups=2, conv_bias=True)

    mixers = [recurrent(), Attention(32, 4, 2, Rope(rotated_share=0.5)), recurrent()]
    ours = Decoder(VOCABULARY, 32, mixers, [SwiGLU(32, 48) for _ in mixers], norm_eps=1e-5)
    ours.load_state_dict({name: of_bamba(theirs, name) for name in ours.state_dict()})
    name_stateful_modules(ours)
    return theirs, ours.eval()


RECURRENT = {"inner.weight": "in_proj.weight", "out.weight": "out_proj.weight", **VECTORS}
WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.final_layernorm.weight",
    "head.weight": "lm_head.weight",
}


def of_bamba(theirs, name):
    """The weight of theirs that ours of this name is."""
    if name in WHOLE:
        return theirs.get_parameter(WHOLE[name]).data
    _, layer, part = name.split(".", 2)
    path = part.removesuffix(".weight")
    if path.startswith("mixer.taps"):
        taps = theirs.get_parameter(f"model.layers.{layer}.mamba.conv1d.{path_end(part)}").data
        # Ours have the newest token first.
        return taps if taps.dim() == 1 else taps[:, 0].flip(-1).T
    inside = part.removeprefix("mixer.")
    if layer != "1" and inside in RECURRENT:
        return theirs.get_parameter(f"model.layers.{layer}.mamba.{RECURRENT[inside]}").data
    path = PARTS[path].replace("mlp", "feed_forward").replace("post_attention", "pre_ff")
    return theirs.get_parameter(f"model.layers.{layer}.{path}.weight").data


def path_end(path):
    return path.rpartition(".")[2]


@pytest.mark.full
def test_tokens_of_a_hybrid():
    theirs, ours = hybrid()
    found = equal(theirs, ours, prompts())
    assert len({token for tokens in found for token in tokens}) >= 20


LONG = {"max_position_embeddings": 256}
FROM_FOLDERS = {
    "latent": ("DeepseekV3Config", {**hub.SMALL_DEEPSEEK, **LONG}),
    "mamba2": ("Mamba2Config", {**hub.SMALL_MAMBA2, "n_groups": 2}),
}


@pytest.mark.short("mamba2")
@pytest.mark.parametrize("case", FROM_FOLDERS)
def test_tokens_of_models_from_folders(case, tmp_path):
    theirs = hub.make(*FROM_FOLDERS[case], tmp_path).float()
    ours = hub.ours(tmp_path, "context_length=256").float()
    theirs.generation_config.eos_token_id = None
    equal(theirs, ours, prompts(hub.WORDS))
