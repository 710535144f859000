"""The GPU kernels: what is called exists, what is handed over is laid out as they want it, what
comes back is the tile's.

Where there is no GPU, PyTorch's meta kernels tell shapes and dtypes, and a stand-in that computes
in float64 tells numbers.
"""

import pytest
import torch

from models.kernels import reference, sdpa_cpu, sdpa_cuda
from models.kernels.backends import select_kernel
from models.masks.algebra import Mask
from models.masks.basic import Causal
from models.scores import Score
from models.span import Span
from tests.support.cuda_kernels import BOUND, GPUS, SCALE, stand_in, tensors

HOPPER, ADA, TURING, NONE = (9, 0), (8, 9), (7, 5), (0, 0)
QKV, REST = ["query", "key", "value"], ["dropout_p", "is_causal"]
SEEDS = ["philox_seed", "philox_offset"]
SHAPES = {
    "plain": (70, 90, 4, 4, 16, 16),
    "grouped": (70, 70, 6, 2, 12, 20),
    "one": (1, 1, 2, 1, 6, 3),
    "planned": (128, 256, 4, 2, 16, 24),
}
WHO = {"planned": "cudnn"}  # else flash serves half precision


def truth(q, k, v, mask, d_out, add=None):
    """(mean, mass, gradients) of the tile in float64; add is [1, 1, t, s]."""
    score = Score(SCALE)
    if add is not None:
        score.bias = lambda span, kv_span, heads, dtype: add.to(dtype)
    span, kv_span = (Span.line(2, x.shape[1]) for x in (q, k))
    span, kv_span = (s.map(lambda t: t.to(q.device)) for s in (span, kv_span))
    q, k, v, d_out = (x.double() for x in (q, k, v, d_out))
    heads = torch.arange(q.shape[2], device=q.device)
    mean, lse = reference.forward(score, mask, (q,), (k, v), (), span, kv_span, heads)
    delta = (d_out * mean).sum(-1)
    return (
        mean,
        lse,
        reference.backward(
            score, mask, (q,), (k, v), (), span, kv_span, heads, d_out=d_out, lse=lse, delta=delta
        ),
    )


def check(some, mask, triangle, add=None, bound=1e-2):
    """One block, beside the tile."""
    q, k, v = some
    d_out = torch.randn(2, q.shape[1], q.shape[2], v.shape[-1], device=q.device).to(q.dtype).float()
    mean, lse = sdpa_cuda.forward(q, k, v, SCALE, triangle, add)
    want_mean, want_mass, want = truth(q, k, v, mask, d_out, add)
    assert mean.dtype == lse.dtype == torch.float32
    grads = sdpa_cuda.backward(
        q, k, v, SCALE, triangle, add, d_out=d_out, mean=want_mean.float(), lse=want_mass.float()
    )
    assert all(g.shape == x.shape for g, x in zip(grads, some))
    for got, right in zip((mean, lse, *grads), (want_mean, want_mass, *want)):
        torch.testing.assert_close(
            got.double(),
            right,
            rtol=bound,
            atol=bound * max(1, float(right[right.isfinite()].std())),
        )


def hiding(queries, keys, dtype, device="cpu", numbers=False):
    """[1, 1, t, s]: hides keys at random, and all of them from query 2."""
    torch.manual_seed(1)
    add = torch.randn(1, 1, queries, keys) if numbers else torch.zeros(1, 1, queries, keys)
    add = add.masked_fill(torch.rand(queries, keys) < 0.4, -torch.inf)
    add[..., 0] = 0
    add[..., 2, :] = -torch.inf
    return add.to(device, dtype)


@pytest.mark.parametrize(
    "op, names",
    [
        (sdpa_cuda.flash, [*QKV, *REST, "return_debug_mask", "scale"]),
        (
            sdpa_cuda.flash_backward,
            [
                "grad_out",
                *QKV,
                "out",
                "logsumexp",
                "cum_seq_q",
                "cum_seq_k",
                "max_q",
                "max_k",
                *REST,
                *SEEDS,
                "scale",
            ],
        ),
        (
            sdpa_cuda.cudnn,
            [*QKV, "attn_bias", "compute_log_sumexp", *REST, "return_debug_mask", "scale"],
        ),
        (
            sdpa_cuda.cudnn_backward,
            [
                "grad_out",
                *QKV,
                "out",
                "logsumexp",
                *SEEDS,
                "attn_bias",
                "cum_seq_q",
                "cum_seq_k",
                "max_q",
                "max_k",
                *REST,
                "scale",
            ],
        ),
        (sdpa_cuda.efficient, [*QKV, "attn_bias", "compute_log_sumexp", *REST, "scale"]),
        (
            sdpa_cuda.efficient_backward,
            [
                "grad_out_",
                *QKV,
                "attn_bias",
                "out",
                "logsumexp",
                *SEEDS,
                REST[0],
                "grad_input_mask",
                REST[1],
                "scale",
            ],
        ),
    ],
)
def test_this_pytorch_has_the_kernels_with_the_arguments_they_are_called_with(op, names):
    assert [argument.name for argument in op._schema.arguments] == names


def test_the_table_knows_who_computes_what():
    curved = Score()
    curved.plain = False
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert (
            select_kernel(torch.device("cuda"), dtype, Score()) is sdpa_cuda
            and select_kernel(torch.device("cpu"), dtype, Score()) is sdpa_cpu
        )
        assert (
            select_kernel(torch.device("cuda"), dtype, curved) is None
            and select_kernel(torch.device("cpu"), dtype, curved) is None
        )
    assert select_kernel(torch.device("cpu"), torch.float64, Score()) is sdpa_cpu
    assert (
        select_kernel(torch.device("cuda"), torch.float64, Score()) is None
        and select_kernel(torch.device("xpu"), dtype, Score()) is None
    )


def test_amd_devices_have_the_general_tile(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert select_kernel(torch.device("cuda"), torch.bfloat16, Score()) is None


@pytest.mark.parametrize(
    "dtypes, width, generation, kernel, dtype",
    [
        (["bfloat16"] * 3, 64, HOPPER, "flash", "bfloat16"),
        (["float16"] * 3, 256, ADA, "flash", "float16"),
        (["float16"] * 3, 200, ADA, "efficient", "float16"),  # too little shared memory
        (["float16"] * 3, 264, HOPPER, "efficient", "float16"),  # too wide
        (["float16"] * 3, 64, TURING, "efficient", "float16"),
        (["bfloat16"] * 3, 64, TURING, "efficient", "float32"),  # that GPU has no bfloat16
        (["bfloat16"] * 3, 64, NONE, "efficient", "float32"),
        (["float32"] * 3, 64, HOPPER, "efficient", "float32"),
        (["bfloat16"] * 4, 64, HOPPER, "efficient", "bfloat16"),  # hides keys, exactly
        (["bfloat16"] * 3 + ["float32"], 64, HOPPER, "efficient", "float32"),  # carries numbers
        (["bfloat16", "float32", "bfloat16"], 64, HOPPER, "efficient", "float32"),
    ],
)
def test_a_block_goes_to_a_kernel_that_can_compute_it(dtypes, width, generation, kernel, dtype):
    found = sdpa_cuda.choose_kernel(
        [getattr(torch, d) for d in dtypes], width, width - 3, generation
    )
    assert (found.kernel, found.dtype) == (kernel, getattr(torch, dtype))
    assert found.key % 8 == found.value % 8 == 0 and found.key >= width and found.value >= width - 3


@pytest.mark.parametrize(
    "generation, sides, kernel",
    [
        (HOPPER, (4096, 128), "cudnn"),
        ((10, 0), (256, 256), "cudnn"),
        (HOPPER, (4096, 100), "flash"),  # a new length every step would be planned anew
        ((8, 0), (4096, 4096), "flash"),
        ((12, 0), (4096, 4096), "flash"),
    ],
)
def test_cudnn_serves_sides_that_come_again(generation, sides, kernel):
    half = [torch.bfloat16] * 3
    assert sdpa_cuda.choose_kernel(half, 64, 64, generation, sides).kernel == kernel
    wide = [torch.float32] * 3
    assert sdpa_cuda.choose_kernel(wide, 64, 64, generation, sides).kernel == "efficient"


@pytest.mark.every_case
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("triangle", [False, True])
@pytest.mark.parametrize("dtype, who", [(torch.bfloat16, "flash"), (torch.float32, "efficient")])
def test_numbers_are_the_tiles_whatever_heads_and_widths(monkeypatch, shape, triangle, dtype, who):
    called, (queries, keys, *rest) = stand_in(monkeypatch), SHAPES[shape]
    some = tensors(queries, queries if triangle else keys, *rest, dtype=dtype)
    check(
        some,
        Causal() if triangle else Mask(),
        triangle,
        bound=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )
    assert called == [WHO.get(shape, who) if who == "flash" else who]


@pytest.mark.parametrize(
    "dtype, numbers", [("bfloat16", False), ("float32", False), ("float32", True)]
)
def test_a_matrix_hides_keys_and_a_blind_query_gets_nothing(monkeypatch, dtype, numbers):
    called, dtype = stand_in(monkeypatch), getattr(torch, dtype)
    some, add = tensors(37, 41, dtype=dtype), hiding(37, 41, dtype, numbers=numbers)
    check(some, Mask(), False, add, bound=1e-2 if dtype == torch.bfloat16 else 1e-5)
    mean, lse = sdpa_cuda.forward(*some, SCALE, False, add)
    assert (lse[:, 2] == -torch.inf).all() and not mean[:, 2].any() and set(called) == {"efficient"}


def test_numbers_in_the_matrix_are_not_rounded_to_half_precision(monkeypatch):
    stand_in(monkeypatch)
    some, add = tensors(9, 9), 300 + hiding(9, 9, torch.float32, numbers=True)
    check(some, Mask(), False, add, bound=1e-4)  # float32 itself rounds 300 by 3e-5


def test_views_that_a_kernel_cannot_load_are_laid_out_again(monkeypatch):
    stand_in(monkeypatch)
    some = [
        torch.randn(2, 9, 3, x.shape[-1] + 3).to(x.dtype)[:, 1:, :, 1:-2]
        for x in tensors(9, 9, 3, 3, 8, 8)
    ]
    check(some, Causal(), True)
    check([x.transpose(1, 3).contiguous().transpose(1, 3) for x in some], Causal(), True)
    check([x.float() for x in some], Causal(), True)


@pytest.mark.parametrize("queries, keys", [(0, 5), (5, 0)])
def test_an_empty_side_is_refused(queries, keys):
    with pytest.raises(ValueError, match=f"a block has queries and keys, got {queries} and {keys}"):
        sdpa_cuda.forward(*tensors(queries, keys), SCALE, False, None)


@pytest.mark.every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
def test_the_real_kernels_take_what_they_are_given_and_return_what_is_said(dtype, added):
    some = tensors(37, 41, 6, 2, 12, 20, dtype=dtype, device="meta")
    add = torch.empty(1, 1, 37, 41, dtype=dtype, device="meta") if added else None
    mean, lse = sdpa_cuda.forward(*some, SCALE, False, add)
    assert (
        mean.shape == (2, 37, 6, 20)
        and lse.shape == (2, 37, 6)
        and mean.dtype == lse.dtype == torch.float32
    )
    grads = sdpa_cuda.backward(*some, SCALE, False, add, d_out=mean, mean=mean, lse=lse)
    assert all(g.shape == x.shape for g, x in zip(grads, some))
    assert all(g.dtype in (dtype, torch.float32) for g in grads)


if GPUS:  # where there are none there is nothing to skip

    @pytest.mark.parametrize("device", GPUS, ids=str)
    @pytest.mark.parametrize("dtype", BOUND, ids=str)
    def test_on_a_gpu_every_kind_of_block_is_the_tiles(device, dtype):
        for queries, keys, *rest in (
            *SHAPES.values(),
            (130, 130, 4, 2, 128, 64),
            (65, 40, 2, 2, 256, 256),
            (128, 384, 8, 2, 192, 128),
            (256, 256, 4, 1, 256, 256),
        ):
            check(
                tensors(queries, keys, *rest, dtype=dtype, device=device),
                Mask(),
                False,
                bound=BOUND[dtype],
            )
            check(
                tensors(queries, queries, *rest, dtype=dtype, device=device),
                Causal(),
                True,
                bound=BOUND[dtype],
            )
        some = tensors(67, 83, dtype=dtype, device=device)
        check(some, Mask(), False, hiding(67, 83, dtype, device), bound=BOUND[dtype])
        check(
            some,
            Mask(),
            False,
            hiding(67, 83, torch.float32, device, numbers=True),
            bound=BOUND[dtype],
        )
