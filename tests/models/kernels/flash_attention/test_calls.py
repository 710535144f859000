"""flash-attn by stand-ins with its signatures: arguments are as a version takes them, and what
comes back is the reference's, forward and backward with the lse from outside, over ranks too."""

import sys
from functools import wraps

import pytest
import torch
import torch.distributed as dist

from models.kernels import backends, sdpa_cuda
from models.kernels.flash_attention.releases import FLASH_2, FLASH_3, FLASH_4, RELEASES
from models.masks.algebra import Mask
from models.masks.basic import Causal, SameChunk, SameDocument, SlidingWindow
from models.primitives.softmax import Softmax
from models.scores import Score, SinkScore, SoftcapScore
from models.span import Span
from parallel import key_parts
from parallel.collectives import Communicator
from parallel.drivers.softmax_allgather import AllGather
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_ulysses import Ulysses
from parallel.layout import contiguous, zigzag
from parallel.sharding import shard_span
from tests.models.kernels.test_packed import BANDS, check_packed
from tests.models.kernels.test_sdpa_cuda import SHAPES, check
from tests.support.cuda_kernels import BOUND, stand_in, tensors
from tests.support.flash_packages import installed
from tests.support.parity import packed, relative
from tests.support.pool import ranks

HOPPER, BLACKWELL = (9, 0), (10, 0)
HALF = torch.float16
# Over rows of documents and windows every call is packed.
MASKS = {
    "causal": Causal() & SameDocument(),
    "capped": Causal() & SameDocument(),
    "window": Causal() & SameDocument() & SlidingWindow(7),
    "documents": SameDocument(),
}
SCORES = {"capped": SinkScore(SoftcapScore(Score(0.9), 1.5))}
METHODS = {"ring": Ring, "allgather": AllGather, "ulysses": Ulysses}
LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag}
# Of 60 tokens on three ranks the last contiguous one has none but padding.
LENGTHS = [[13, 1, 19], [3, 30, 1, 1]]
TOKENS = 60
PART = 5  # tokens of a part of keys: several parts, with fewer keys than queries


@pytest.mark.parametrize("triangle", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RELEASES)
def test_a_block_is_what_the_reference_computes(monkeypatch, name, shape, triangle):
    queries, keys, *rest = SHAPES[shape]
    # Before cuDNN, which would serve the planned sides.
    monkeypatch.setitem(sdpa_cuda.ORDER, 9, (name,))
    some = tensors(queries, queries if triangle else keys, *rest)
    with installed(name) as called:
        check(some, Causal() if triangle else Mask(), triangle)
    assert called == [(name, "forward", False), (name, "backward", False)]


@pytest.mark.parametrize("keys", [90, 12])
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("name", RELEASES)
def test_packed_stretches_are_what_the_reference_computes(name, band, keys):
    with installed(name) as called:
        check_packed(BANDS[band], HALF, "cpu", BOUND[HALF], keys=keys)
    assert {(each, packed) for each, _, packed in called} == {(name, True)}
    assert {passed for _, passed, _ in called} == {"forward", "backward"}


@pytest.mark.parametrize("widths, filled", [((16, 24), (24, 24)), ((192, 128), (192, 128))])
def test_heads_of_blackwell_are_filled_up_as_flash_attn_4_takes_them(monkeypatch, widths, filled):
    monkeypatch.setattr(sdpa_cuda, "capability", lambda device: BLACKWELL)
    q, k, v = tensors(20, 20, 4, 2, *widths, dtype=HALF)
    assert sdpa_cuda.packed_choice(q, k, v).kernel != FLASH_4
    with installed(FLASH_4) as called:
        use = sdpa_cuda._way(q, k, v, None)
        assert (use.key, use.value) == filled
        check((q, k, v), Causal(), True)
    assert [each[0] for each in called] == [FLASH_4] * 2


def row_inputs(score):
    """q, k, v, sinks where the score has some, and the weight of the output."""
    draw = torch.Generator().manual_seed(3)
    shapes = (3, 8), (1, 8), (1, 5), (3, 5)
    some = [torch.randn(2, TOKENS, *shape, generator=draw).to(HALF) for shape in shapes]
    sinks = [torch.randn(3, generator=draw).to(HALF)] if isinstance(score, SinkScore) else []
    return [*some[:3], *sinks, some[3]]


def attend(core, span, some):
    """Output and the gradients of q, k, v and the sinks."""
    *leaves, weight = some
    q, k, v, *sinks = leaves = [x.clone().requires_grad_() for x in leaves]
    valid = span.valid()[..., None, None]
    output = core((q,), (k, v), sinks, span=span).masked_fill(~valid, 0)
    return output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)


def compare(env, name, method, layout, mask):
    """(worst relative difference of this rank from one process in float64, calls)."""
    whole = packed(LENGTHS, TOKENS)
    core = Softmax(MASKS[mask], SCORES.get(mask))
    some = row_inputs(core.score)
    wanted = attend(core, whole, [x.double() for x in some])
    here = shard_span(whole, [LAYOUTS[layout](TOKENS, env.size)], env.rank)
    shard = here.sharding.shard
    driver = METHODS[method](core, Communicator(env.group))
    *tokens, weight = some[:3] + some[-1:]
    here_too = [*(shard(x, 0) for x in tokens), *some[3:-1], shard(weight, 0)]
    with pytest.MonkeyPatch.context() as patch, installed(name) as called:
        patch.setitem(backends.TABLE, ("cpu", HALF), sdpa_cuda)
        patch.setattr(sdpa_cuda, "capability", lambda device: HOPPER)
        patch.setitem(key_parts.PART_TOKENS, "cpu", PART)
        patch.setitem(key_parts.PART_BYTES, "cpu", 1)
        found = [x.double() for x in attend(driver, here, here_too)]
    for gradient in found[4:]:
        dist.all_reduce(gradient, group=env.group)
    wanted = [*(shard(x, 0) for x in wanted[:4]), *wanted[4:]]
    worst = max(relative(got, want) for got, want in zip(found, wanted, strict=True))
    return worst, sorted(set(called)), bool(here.valid().any())


@pytest.mark.every_case
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "name, method, layout",
    [
        (FLASH_2, "ring", "contiguous"),
        (FLASH_3, "ring", "zigzag"),
        (FLASH_3, "allgather", "contiguous"),
        (FLASH_4, "ring", "contiguous"),
        (FLASH_2, "ulysses", "contiguous"),
    ],
)
def test_three_ranks_are_one_process(name, method, layout, mask):
    for worst, called, holds in ranks(3, compare, name, method, layout, mask):
        assert worst < BOUND[HALF]
        assert not holds or called == [(name, "backward", True), (name, "forward", True)]


def test_a_version_that_fails_is_given_up_and_another_kernel_serves(monkeypatch):
    served = stand_in(monkeypatch)
    some = tensors(20, 20, dtype=HALF)
    with installed(FLASH_3) as called:
        module = sys.modules["flash_attn_interface"]

        @wraps(module._flash_attn_backward)
        def fail(**arguments):
            raise RuntimeError("no kernel image")

        monkeypatch.setattr(module, "_flash_attn_backward", fail)
        with pytest.warns(UserWarning, match="no flash-attn 3 .*no kernel image"):
            check(some, Causal(), True)
        check(some, Causal(), True)
    assert called == [(FLASH_3, "forward", False)]
    assert served == ["flash"]


@pytest.mark.parametrize("fails", ["_flash_attn_forward", "_flash_attn_backward"])
def test_capped_logits_go_on_without_a_version_that_fails(monkeypatch, fails):
    """To the tiles of the reference here, to our own Triton kernels on a GPU."""
    monkeypatch.setitem(backends.TABLE, ("cpu", HALF), sdpa_cuda)
    core = Softmax(Causal(), SoftcapScore(Score(), 2.0))
    draw = torch.Generator().manual_seed(3)
    some = [torch.randn(2, 40, 2, 8, generator=draw).to(HALF) for _ in range(4)]
    wanted = attend(core, Span.line(2, 40), [x.double() for x in some])
    with installed(FLASH_3) as called:
        module = sys.modules["flash_attn_interface"]

        @wraps(getattr(module, fails))
        def fail(**arguments):
            raise RuntimeError("no softcap in this build")

        monkeypatch.setattr(module, fails, fail)
        with pytest.warns(UserWarning, match="no flash-attn 3 .*no softcap"):
            found = attend(core, Span.line(2, 40), some)
        again = attend(core, Span.line(2, 40), some)
    for got, more, want in zip(found, again, wanted, strict=True):
        assert relative(got.double(), want) < BOUND[HALF]
        assert relative(more.double(), want) < BOUND[HALF]
    assert called == [(FLASH_3, "forward", True)] * (fails == "_flash_attn_backward")


@pytest.mark.parametrize(
    "mask, banded", [(Causal(), True), (Causal() & SameChunk(40), False)], ids=str
)
@pytest.mark.parametrize("name", RELEASES)
def test_capped_logits_are_served_where_the_mask_is_bands(monkeypatch, name, mask, banded):
    """However long a stretch is."""
    monkeypatch.setitem(backends.TABLE, ("cpu", HALF), sdpa_cuda)
    core = Softmax(mask, SoftcapScore(Score(), 2.0))
    draw = torch.Generator().manual_seed(3)
    some = [torch.randn(1, 1100, 1, 8, generator=draw).to(HALF) for _ in range(4)]
    span = Span.line(1, 1100)
    wanted = attend(core, span, [x.double() for x in some])
    with installed(name) as called:
        found = attend(core, span.fresh(), some)
    for got, want in zip(found, wanted, strict=True):
        assert relative(got.double(), want) < BOUND[HALF]
    assert called == [(name, "forward", True), (name, "backward", True)] * banded
