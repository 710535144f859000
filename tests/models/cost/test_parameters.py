"""Parameters, FLOPs and bytes against counts made by hand, by torch's own counter, and by what
autograd really keeps."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.attention.sliding import Sliding
from models.cost.activation_memory import activation_bytes, state_bytes
from models.cost.flops import count_flops
from models.cost.parameters import count_parameters
from models.cost.visible_pairs import visible_triples
from models.feedforward import SwiGLU
from models.init import initialise
from models.masks.algebra import Mask, visible
from models.masks.basic import Causal, SameDocument, SlidingWindow
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.span import Span
from tests.support.parity import packed

WORDS, WIDTH, HEADS, KV, FFN, LAYERS = 257, 24, 6, 2, 40, 2
MATRICES = (
    LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH * KV // HEADS + 3 * WIDTH * FFN) + WORDS * WIDTH
)
NORMS = (2 * LAYERS + 1) * WIDTH
CAUSAL = Causal() & SameDocument()
MASKS = [
    CAUSAL,
    CAUSAL & SlidingWindow(5),
    SameDocument(),
    ~Causal(),
    Mask(),
    Causal(),
    (SlidingWindow(3) & CAUSAL) | ~SlidingWindow(9) & CAUSAL,
]


def swiglu(layers):
    return [SwiGLU(WIDTH, FFN) for _ in range(layers)]


def decoder(tie=True, device="meta"):
    with torch.device(device):
        mixers = [Attention(WIDTH, HEADS, KV, Rope()), Sliding(WIDTH, HEADS, KV, Rope(), window=7)]
        return Decoder(WORDS, WIDTH, mixers, swiglu(2), position=Rope(), tie_embeddings=tie)


@pytest.mark.parametrize("tie", [True, False])
def test_parameters_are_counted_once(tie):
    sizes = count_parameters(decoder(tie))
    assert sizes.total == sizes.active == MATRICES + NORMS + (0 if tie else WORDS * WIDTH)
    assert sizes.embedding == WORDS * WIDTH


def test_a_share_that_tokens_visit_counts_as_active():
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Sequential(nn.Linear(5, 4, bias=False)))
    model[1].active_share = 0.25
    assert (count_parameters(model).total, count_parameters(model).active) == (35, 20)


@pytest.mark.parametrize("mask", MASKS)
def test_the_area_of_a_mask_is_what_its_dense_form_lets_through(mask):
    for lengths in ([[13, 1, 24, 9], [3, 40, 1, 1]], [[51], [20, 31]], [[1] * 30, []]):
        span = packed(lengths)
        assert visible_triples(mask, span, heads=3) == 3 * int(visible(mask, span, span).sum())


def test_a_mask_by_heads_is_counted_head_by_head():
    class ByHead(Mask):
        def dense(self, q, k, heads=None):
            return (q.pos[:, None, :, None] - k.pos[:, None, None, :]) <= heads[None, :, None, None]

        def coverage(self, q, k):
            return 1

        def band(self, q, k):
            return None

    span = packed()
    want = int(visible(ByHead(), span, span, torch.arange(4)).sum())
    assert visible_triples(ByHead(), span, heads=4) == want


def test_forward_flops_are_matrices_and_visible_pairs():
    flops, span = count_flops(decoder()), packed()
    assert flops.token_flops == 2 * MATRICES
    width = WIDTH // HEADS
    full, near = (
        int(visible(mask, span, span).sum()) for mask in (CAUSAL, CAUSAL & SlidingWindow(7))
    )
    tokens = int(span.valid().sum())
    assert flops.forward(span) == 2 * MATRICES * tokens + 4 * width * HEADS * (full + near)
    assert flops.training(span) == 3 * flops.forward(span)


def test_on_one_document_that_sees_everything_torch_counts_the_same():
    class Everything(Attention):
        """Attention in the open, for torch's counter, which sees matrix products only."""

        def forward(self, x, span):
            q, k, v = (
                p(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
                for p in (self.q, self.k, self.v)
            )
            k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
            return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2))

    with torch.device("meta"):
        mixers = [Everything(WIDTH, HEADS, KV, Rope()) for _ in range(LAYERS)]
        seen = Decoder(WORDS, WIDTH, mixers, swiglu(LAYERS), position=Rope())
        ours = Decoder(
            WORDS,
            WIDTH,
            [Attention(WIDTH, HEADS, KV, Rope(), mask=Mask()) for _ in range(LAYERS)],
            swiglu(LAYERS),
        )
    with FlopCounterMode(display=False) as counter:
        seen(
            MicroBatch(
                torch.zeros(1, 33, dtype=torch.long, device="meta"), Span.line(1, 33, device="meta")
            )
        )
    assert counter.get_total_flops() == count_flops(ours).forward(Span.line(1, 33))


def test_a_long_row_is_counted_without_its_square():
    size, reach = 300_000, 4096
    flops = count_flops(decoder()).cores
    assert visible_triples(flops[0].mask, Span.line(1, size)) == size * (size + 1) // 2
    assert (
        visible_triples(CAUSAL & SlidingWindow(reach), Span.line(1, size))
        == reach * (reach + 1) // 2 + (size - reach) * reach
    )


def test_state_bytes_by_precision_and_shards():
    total = MATRICES + NORMS
    model = decoder()
    assert state_bytes(model) == {
        "parameters": 4 * total,
        "copies": 0,
        "gradients": 4 * total,
        "optimiser": 8 * total,
    }
    assert state_bytes(model, "float64")["optimiser"] == 16 * total
    assert state_bytes(model, "bfloat16")["copies"] == 2 * total
    shared = state_bytes(model, "bfloat16", shards=4)
    assert total <= shared["parameters"] < total + 4 * len(list(model.parameters()))
    assert shared["copies"] == 2 * (
        WORDS * WIDTH + WIDTH + sum(p.numel() for p in model.blocks[0].parameters())
    )


@pytest.mark.parametrize(
    "precision, dtype", [("float32", torch.float32), ("float64", torch.float64)]
)
def test_activation_bytes_are_what_autograd_keeps(precision, dtype):
    model, size = initialise(decoder(device="cpu"), seed=0).to(dtype), 96
    storages = {id(p.untyped_storage()): p.untyped_storage() for p in model.parameters()}
    own = len(storages)

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages.setdefault(id(storage), storage)
        return tensor

    tokens = torch.zeros(1, size, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(MicroBatch(tokens, Span.line(1, size), tokens))
    kept = sum(storage.nbytes() for storage in list(storages.values())[own:])
    assert activation_bytes(model, size, precision) == pytest.approx(kept, rel=0.02)


def test_checkpointing_keeps_one_block_and_the_inputs_of_all():
    def sized(layers, checkpointing):
        with torch.device("meta"):
            model = Decoder(
                WORDS,
                WIDTH,
                [Attention(WIDTH, HEADS, KV, Rope()) for _ in range(layers)],
                swiglu(layers),
            )
        return activation_bytes(model, 1024, checkpointing=checkpointing)

    assert sized(5, "full") - sized(4, "full") == 1024 * WIDTH * 4
    assert sized(1, "full") > sized(1, "none") - 1 and sized(5, "full") < sized(5, "none") / 2
