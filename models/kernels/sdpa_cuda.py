"""Blocks on an NVIDIA GPU, by the PyTorch kernels whose backward takes the lse over ALL keys.

`cudnn` (NVIDIA's cuDNN, Hopper and Blackwell) is the fastest in half precision, but plans for 50 ms
whatever shape it meets first: it serves blocks whose sides are multiples of 128, which a run meets
again, and not documents, which end anywhere. `flash` (Dao 2023, arXiv:2307.08691) takes every other
block in half precision without a matrix to add; `efficient` (Rabe & Staats 2021, arXiv:2112.05682,
as built in xFormers) takes float32, and blocks with one. Guarded here, each held by a test: key and
value widths are filled up with zeros to what a kernel takes (flash: equal, multiples of 8);
pointers and strides are multiples of 8 elements; the added matrix has rows of a multiple of 16;
`efficient` wants as many key heads as query heads, and lse in rows of a multiple of 32, filled up
with plus infinity; a query that sees no key answers lse minus infinity, mean 0.

`forward_packed` and `backward_packed` take many stretches of queries and keys at once, under one
pair of bounds (models/kernels/band_plan.py), by flash alone: cuDNN's kernel for packed sequences
was 30 times slower on an H200.

Where flash-attn 2, 3 or 4 is installed (models/kernels/flash_attention.py), ORDER says before which
of these kernels it serves, blocks and packed stretches alike.

Half precision stays half inside a block and is summed wide over blocks. A matrix in half precision
only hides keys and is exact; one that is wide carries numbers, and its block is computed in
float32. float64 and ROCm use the reference kernel.
Left out: FlexAttention takes no lse from outside, so it cannot serve in a ring. The order of sums
of the backward passes is only fixed under `torch.use_deterministic_algorithms(True)`.

Letters: b rows, t queries, s keys, H query heads, G key heads, D key width, E value width; N, M
queries and keys of packed stretches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.kernels.band_plan import EVERY, BandCall
from models.kernels.flash_attention import calls, releases
from models.kernels.flash_attention.releases import FLASH_2, FLASH_3, FLASH_4, RELEASES
from models.kernels.kernel_inputs import ALIGN, KernelChoice, loadable, lse_by_head
from models.kernels.reference import Partial, accumulation_dtype

# elements
BIAS_ALIGN = 16
MASS_ALIGN = 32
WIDEST = 256  # head width of flash and cudnn
PLANNED = 128  # cudnn serves blocks whose sides are multiples of it
HALF = torch.float16, torch.bfloat16

CUDNN, FLASH, EFFICIENT = "cudnn", "flash", "efficient"
# By the first number of a generation, what serves half precision before PyTorch's flash: the first
# that is there and takes the widths. 3 is written for Hopper, 4 for Hopper and Blackwell.
ORDER = {
    8: (FLASH_2,),
    9: (FLASH_3, FLASH_4, CUDNN, FLASH_2),
    10: (FLASH_4, CUDNN, FLASH_2),
    12: (FLASH_2,),
}

cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default
cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
flash = torch.ops.aten._scaled_dot_product_flash_attention.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
packed_flash = torch.ops.aten._flash_attention_forward.default
packed_flash_backward = torch.ops.aten._flash_attention_backward.default


def capability(device: torch.device) -> tuple[int, int]:
    """Generation of the GPU; (0, 0) where this build of PyTorch lacks flash, and Hopper for tensors
    without numbers."""
    if device.type != "cuda":
        return 9, 0
    if not torch.backends.cuda.is_flash_attention_available():
        return 0, 0
    return torch.cuda.get_device_capability(device)


def choose_kernel(
    dtypes: list[torch.dtype],
    key: int,
    value: int,
    generation: tuple[int, int],
    sides: tuple[int, int] = (1, 1),
    packages: Sequence[str] = (),
) -> KernelChoice:
    """Chooses by what is to be computed.

    Args:
        dtypes: those of q, k, v and of the added matrix if there is one.
        key, value: widths.
        generation: see `capability`.
        sides: numbers of queries and of keys.
        packages: versions of flash-attn that may serve.
    """
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    key, value = (-(-width // ALIGN) * ALIGN for width in (key, value))
    widest = max(key, value)
    # These generations have too little shared memory for some widths.
    small = generation[0] == 12 or (generation[0] == 8 and generation[1] > 0)
    able = generation >= (8, 0) and widest <= WIDEST and not (small and 192 < widest <= 224)
    if dtype in HALF and len(dtypes) == 3 and able:
        planned = all(side % PLANNED == 0 for side in sides)
        for kernel in ORDER.get(generation[0], ()):
            if kernel == CUDNN and planned:
                return KernelChoice(CUDNN, dtype, key, value)
            if kernel in packages:
                filled = releases.widths(kernel, generation, key, value)
                if filled is not None:
                    return KernelChoice(kernel, dtype, *filled)
        return KernelChoice(FLASH, dtype, widest, widest)
    if dtype == torch.bfloat16 and generation < (8, 0):
        dtype = torch.float32
    return KernelChoice(EFFICIENT, dtype, key, value)


def takes_packed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tells whether `forward_packed` serves these tensors: where flash does."""
    return packed_choice(q, k, v).kernel != EFFICIENT


def packed_choice(q: Tensor, k: Tensor, v: Tensor) -> KernelChoice:
    """Returns the choice for packed stretches, [N, H, D] and [M, G, D] or with rows before."""
    # Sides of 1: packed stretches end anywhere.
    return _choose((q, k, v), (1, 1))


def _way(q: Tensor, k: Tensor, v: Tensor, add: Tensor | None) -> KernelChoice:
    tensors = (q, k, v) if add is None else (q, k, v, add)
    return _choose(tensors, (q.shape[1], k.shape[1]))


def _choose(tensors: Sequence[Tensor], sides: tuple[int, int]) -> KernelChoice:
    q, _, v, *_ = tensors
    widths = q.shape[-1], v.shape[-1]
    # Not every version of flash-attn tells shapes of tensors without numbers.
    counted = not (q.is_meta or isinstance(q, FakeTensor))
    packages = releases.available() if counted else ()
    dtypes = [x.dtype for x in tensors]
    return choose_kernel(dtypes, *widths, capability(q.device), sides, packages)


def _ready(x: Tensor, dtype: torch.dtype, width: int, *, packed: bool = False) -> Tensor:
    """[b, t, H, D] -> [b, H, t, width]: filled up, and laid out so that a kernel may load it;
    `packed` allows no gaps."""
    return loadable(x, dtype, width, gapless=packed).transpose(1, 2)


def _spread(x: Tensor, heads: int) -> Tensor:
    """[b, s, G, D] -> [b, s, heads, D]: every query head its own copy of the key head that it
    reads."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _gather(grad: Tensor, like: Tensor) -> Tensor:
    """The adjoint of `_ready(_spread(like))`: [b, heads, s, width] -> [b, s, G, D], sums wide."""
    grad = grad.transpose(1, 2)[..., : like.shape[-1]]
    groups = like.shape[2]
    if grad.shape[2] == groups:
        # What adds it to its wide sum reads it as it is: a wide copy would cost more than the sum.
        return grad
    grad = grad.to(accumulation_dtype(like.dtype))
    return grad.unflatten(2, (groups, grad.shape[2] // groups)).sum(3)


def _bias(add: Tensor | None, dtype: torch.dtype, rows: int, heads: int) -> Tensor | None:
    """[b or 1, H or 1, t, s] -> [b, H, t, s], with rows that begin where a kernel may load them."""
    if add is None:
        return None
    size = add.shape[-1]
    room = add.new_zeros(*add.shape[:-1], size + -size % BIAS_ALIGN, dtype=dtype)
    room[..., :size] = add
    return room[..., :size].expand(rows, heads, *add.shape[2:])


def _own_bounds(triangle: bool) -> tuple[int, int]:
    """A block as a stretch: bounds left and right."""
    return (EVERY, 0) if triangle else (EVERY, EVERY)


def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of flash's generator for a dropout that is 0."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, triangle: bool, add: Tensor | None
) -> Partial:
    """Attends q [b, t, H, D] to k [b, s, G, D], v [b, s, G, E]; `add` [b or 1, H or 1, t, s] holds
    -inf at unseen keys."""
    if not (q.shape[1] and k.shape[1]):
        raise ValueError(f"a block has queries and keys, got {q.shape[1]} and {k.shape[1]}")
    use = _way(q, k, v, add)
    if use.kernel in RELEASES:
        part = calls.forward(use, (q, k, v), scale, _own_bounds(triangle))
        # A version that fails is given up, and another kernel chosen.
        return forward(q, k, v, scale, triangle, add) if part is None else part
    rows = q.shape[0]
    heads = q.shape[2]
    query = _ready(q, use.dtype, use.key)
    if use.kernel == CUDNN:
        both = _ready(k, use.dtype, use.key), _ready(v, use.dtype, use.value)
        mean, lse = cudnn(query, *both, None, True, 0.0, triangle, False, scale=scale)[:2]
        lse = lse.squeeze(-1)
    elif use.kernel == FLASH:
        both = _ready(k, use.dtype, use.key), _ready(v, use.dtype, use.value)
        mean, lse = flash(query, *both, 0.0, triangle, False, scale=scale)[:2]
    else:
        both = (
            _ready(_spread(k, heads), use.dtype, use.key),
            _ready(_spread(v, heads), use.dtype, use.value),
        )
        bias = _bias(add, use.dtype, rows, heads)
        mean, lse = efficient(query, *both, bias, True, 0.0, triangle, scale=scale)[:2]
    mean = mean.transpose(1, 2)[..., : v.shape[-1]].to(accumulation_dtype(q.dtype))
    lse = lse[..., : q.shape[1]].transpose(1, 2).to(mean.dtype)
    if add is not None:
        blind = (add == -torch.inf).all(-1).transpose(1, 2).expand(lse.shape)
        lse = lse.masked_fill(blind, -torch.inf)
        mean = mean.masked_fill(blind[..., None], 0)
    return mean, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    triangle: bool,
    add: Tensor | None,
    *,
    d_out: Tensor,
    mean: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v through a block, given mean and lse over ALL keys.

    Half or wide, as the kernel rounds them.
    """
    use = _way(q, k, v, add)
    if use.kernel in RELEASES:
        bounds = _own_bounds(triangle)
        answer = calls.backward(use, (q, k, v), scale, bounds, d_out=d_out, mean=mean, lse=lse)
        if answer is None:
            return backward(q, k, v, scale, triangle, add, d_out=d_out, mean=mean, lse=lse)
        return answer
    rows = q.shape[0]
    heads = q.shape[2]
    inner_d_out, out = (_ready(x, use.dtype, use.value, packed=True) for x in (d_out, mean))
    query = _ready(q, use.dtype, use.key)
    sizes = (None, None, q.shape[1], k.shape[1])
    if use.kernel == CUDNN:
        both = _ready(k, use.dtype, use.key), _ready(v, use.dtype, use.value)
        none = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout
        tensors = (inner_d_out, query, *both, out, lse_by_head(lse)[..., None])
        grads = cudnn_backward(*tensors, none, none, None, *sizes, 0.0, triangle, scale=scale)
    elif use.kernel == FLASH:
        both = _ready(k, use.dtype, use.key), _ready(v, use.dtype, use.value)
        dropout = _no_dropout(q.device)
        tensors = (inner_d_out, query, *both, out, lse_by_head(lse))
        grads = flash_backward(*tensors, *sizes, 0.0, triangle, *dropout, scale=scale)
    else:
        both = (
            _ready(_spread(k, heads), use.dtype, use.key),
            _ready(_spread(v, heads), use.dtype, use.value),
        )
        bias = _bias(add, use.dtype, rows, heads)
        inner_lse = lse_by_head(lse, MASS_ALIGN)
        none = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout
        rest = none, none, 0.0, [True, True, True, False], triangle
        tensors = inner_d_out, query, *both, bias, out, inner_lse
        grads = efficient_backward(*tensors, *rest, scale=scale)[:3]
    return _gather(grads[0], q), _gather(grads[1], k), _gather(grads[2], v)


def forward_packed(q: Tensor, k: Tensor, v: Tensor, scale: float, call: BandCall) -> Partial:
    """Attends q [N, H, D] to k [M, G, D], v [M, G, E], each stretch of `call` to its own.

    Returns:
        mean [N, H, E] and lse [N, H], wide. Every query sees a key.
    """
    use = packed_choice(q, k, v)
    if use.kernel in RELEASES:
        part = calls.forward(use, (q, k, v), scale, (call.left, call.right), call)
        return forward_packed(q, k, v, scale, call) if part is None else part
    tensors = [loadable(x, use.dtype, use.key) for x in (q, k, v)]
    mean, lse = packed_flash(*tensors, *_packed_sizes(call), scale=scale, **_bounds(call))[:2]
    wide = accumulation_dtype(q.dtype)
    return mean[..., : v.shape[-1]].to(wide), lse.transpose(0, 1).to(wide)


def backward_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    call: BandCall,
    *,
    d_out: Tensor,
    mean: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v, given mean [N, H, E] and lse [N, H] over ALL keys."""
    use = packed_choice(q, k, v)
    if use.kernel in RELEASES:
        bounds = call.left, call.right
        answer = calls.backward(
            use, (q, k, v), scale, bounds, call, d_out=d_out, mean=mean, lse=lse
        )
        if answer is None:
            return backward_packed(q, k, v, scale, call, d_out=d_out, mean=mean, lse=lse)
        return answer
    tensors = [loadable(x, use.dtype, use.key) for x in (d_out, q, k, v, mean)]
    masses = lse_by_head(lse)
    sizes = _packed_sizes(call)[:-1]
    state = _no_dropout(q.device)
    grads = packed_flash_backward(*tensors, masses, *sizes, *state, scale=scale, **_bounds(call))
    return tuple(grad[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v)))


def _packed_sizes(call: BandCall) -> tuple:
    """Ends and lengths, no dropout, the causal flag, and no matrix for debugging."""
    ends = call.query_ends, call.key_ends
    longest = call.longest_query, call.longest_key
    return *ends, *longest, 0.0, call.right == 0, False


def _bounds(call: BandCall) -> dict[str, int | None]:
    bounded = call.left >= 0 or call.right > 0
    return {
        "window_size_left": call.left if bounded else None,
        "window_size_right": call.right if bounded else None,
    }
