"""The encoder-decoder against T5 and BART of transformers: logits and all gradients."""

import pytest
import torch
import transformers

from models.architectures.encoder_decoder import EncoderDecoder
from models.attention.bidirectional import Bidirectional
from models.attention.full import Attention
from models.feedforward import FeedForward, SwiGLU
from models.micro_batch import MicroBatch
from models.positions.learned import Learned
from models.positions.t5 import T5
from models.span import Span

VOCABULARY = 37
WIDTH = 24
HEADS = 3
HEAD_WIDTH = 10
FFN = 40
LAYERS = 2
SOURCE = torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
ROW = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))


def t5_pair():
    """(theirs, ours, [(name there, name here)]); several names there may have one table here."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=HEAD_WIDTH,
        d_ff=FFN,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    theirs = transformers.T5ForConditionalGeneration(config)
    scheme = T5(8, 16, scale=1.0)
    two_sided = T5(8, 16, bidirectional=True, scale=1.0)
    ours = EncoderDecoder(
        VOCABULARY,
        WIDTH,
        HEADS,
        HEADS,
        [Attention(WIDTH, HEADS, HEADS, scheme, head_width=HEAD_WIDTH) for _ in range(LAYERS)],
        [SwiGLU(WIDTH, FFN, activation="gelu_tanh") for _ in range(LAYERS)],
        [
            Bidirectional(WIDTH, HEADS, HEADS, two_sided, head_width=HEAD_WIDTH)
            for _ in range(LAYERS)
        ],
        [SwiGLU(WIDTH, FFN, activation="gelu_tanh") for _ in range(LAYERS)],
        norm_eps=1e-6,
        cross_head_width=HEAD_WIDTH,
        cross_scale=1.0,
    )
    names = [
        ("shared.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("encoder.final_layer_norm.weight", "encoder_norm.weight"),
        ("decoder.final_layer_norm.weight", "norm.weight"),
    ]
    attention = (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
    dense = (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
    for stack, blocks, last in (("encoder", "encoder_blocks", 1), ("decoder", "blocks", 2)):
        for layer in range(LAYERS):
            there = f"{stack}.block.{layer}.layer"
            here = f"{blocks}.{layer}"
            parts = [(f"{there}.0.SelfAttention.{a}", f"{here}.mixer.{b}") for a, b in attention]
            parts.append((f"{there}.0.layer_norm", f"{here}.mixer_norm"))
            if stack == "decoder":
                parts += [
                    (f"{there}.1.EncDecAttention.{a}", f"{here}.cross.{b}") for a, b in attention
                ]
                parts.append((f"{there}.1.layer_norm", f"{here}.cross_norm"))
            parts += [
                (f"{there}.{last}.DenseReluDense.{a}", f"{here}.feedforward.{b}") for a, b in dense
            ]
            parts.append((f"{there}.{last}.layer_norm", f"{here}.feedforward_norm"))
            names += [(f"{a}.weight", f"{b}.weight") for a, b in parts]
            # Theirs has one table for a stack, ours one a layer: its gradient is the sum of ours.
            table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            names.append((table, f"{here}.mixer.tables.table"))
    return theirs, ours, names


def bart_pair():
    """As `t5_pair`."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=True,
        pad_token_id=1,
    )
    theirs = transformers.BartForConditionalGeneration(config)
    tables = Learned(16), Learned(16)
    biased = {"bias": True, "out_bias": True}
    ours = EncoderDecoder(
        VOCABULARY,
        WIDTH,
        HEADS,
        HEADS,
        [Attention(WIDTH, HEADS, HEADS, tables[0], **biased) for _ in range(LAYERS)],
        [FeedForward(WIDTH, FFN) for _ in range(LAYERS)],
        [Bidirectional(WIDTH, HEADS, HEADS, tables[1], **biased) for _ in range(LAYERS)],
        [FeedForward(WIDTH, FFN) for _ in range(LAYERS)],
        position=tables[0],
        encoder_position=tables[1],
        norm="layer",
        norm_place="after",
        embedding_scale=None,
        embedding_norm=True,
        cross_bias=True,
        tie_embeddings=True,
    )
    names = [("model.shared.weight", "embed.weight")]
    attention = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out"))
    for stack, blocks, prefix in (
        ("encoder", "encoder_blocks", "source_"),
        ("decoder", "blocks", ""),
    ):
        position = "encoder_position" if prefix else "position"
        names.append((f"model.{stack}.embed_positions.weight", f"{position}.table.weight"))
        both = [(f"model.{stack}.layernorm_embedding", f"{prefix}embed_norm")]
        for layer in range(LAYERS):
            there = f"model.{stack}.layers.{layer}"
            here = f"{blocks}.{layer}"
            both += [(f"{there}.self_attn.{a}", f"{here}.mixer.{b}") for a, b in attention]
            both.append((f"{there}.self_attn_layer_norm", f"{here}.mixer_norm"))
            if not prefix:
                both += [(f"{there}.encoder_attn.{a}", f"{here}.cross.{b}") for a, b in attention]
                both.append((f"{there}.encoder_attn_layer_norm", f"{here}.cross_norm"))
            both += [(f"{there}.fc1", f"{here}.feedforward.up")]
            both += [(f"{there}.fc2", f"{here}.feedforward.down")]
            both.append((f"{there}.final_layer_norm", f"{here}.feedforward_norm"))
        names += [(f"{a}.{leaf}", f"{b}.{leaf}") for a, b in both for leaf in ("weight", "bias")]
    return theirs, ours, names


@pytest.mark.parametrize("pair", [t5_pair, bart_pair])
def test_logits_and_gradients_are_those_of_transformers(pair):
    torch.manual_seed(0)
    theirs, ours, names = pair()
    assert {here for _, here in names} == {name for name, _ in ours.named_parameters()}
    # Rows 0 and 1 of BART's table of positions serve padding.
    offset = {"model.encoder.embed_positions.weight": 2, "model.decoder.embed_positions.weight": 2}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0 if parameter.dim() > 1 else 1.0, 0.1)
        for there, here in names:
            values = theirs.get_parameter(there)[offset.get(there, 0) :]
            ours.get_parameter(here).copy_(values)
    weight = torch.randn(2, ROW.shape[1], VOCABULARY)
    expected = theirs(input_ids=SOURCE, decoder_input_ids=ROW, use_cache=False).logits
    (expected * weight).sum().backward()
    found = ours(
        MicroBatch(ROW, Span.line(*ROW.shape), None, MicroBatch(SOURCE, Span.line(*SOURCE.shape)))
    )
    (found * weight).sum().backward()
    assert close(found, expected)
    # Theirs may be one parameter under two names, as T5's embedding and head.
    sums: dict[torch.nn.Parameter, torch.Tensor] = {}
    for there, here in names:
        gradient = ours.get_parameter(here).grad
        assert gradient is not None, here
        parameter = theirs.get_parameter(there)
        rows = torch.zeros_like(parameter)
        rows[offset.get(there, 0) :] = gradient
        sums[parameter] = sums.get(parameter, torch.zeros_like(parameter)) + rows
    assert set(sums) == {
        parameter for parameter in theirs.parameters() if parameter.grad is not None
    }
    # The bias of a key moves no softmax: its gradient is rounding, and its scale that of others.
    largest = max(parameter.grad.abs().max() for parameter in sums)
    for parameter, gradient in sums.items():
        assert close(gradient, parameter.grad, least=1e-3 * largest)


def close(found, wanted, least=0.0):
    """Whether two tensors differ by less than 1e-5 of the largest magnitude, or of `least`."""
    return bool((found - wanted).abs().max() < 1e-5 * max(wanted.abs().max(), least))
