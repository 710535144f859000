"""Stand-ins for the packages flash-attn 2, 3 and 4: modules with the signatures of their functions
(2.7 to 2.8.3, 3 of August 2026, 4.0.0b36), which check what they are handed and compute in float64.

    with installed(FLASH_3) as called:          called grows by (name, function, packed, causal)
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from models.kernels.flash_attention import releases
from models.kernels.flash_attention.releases import FLASH_2, FLASH_3, FLASH_4, RELEASES

HALF = torch.float16, torch.bfloat16


def attend(q, k, v, scale, bounds, cap, lse=None, out=None, dout=None):
    """(out, lse) of one sequence [T, H, D], [S, G, D], [S, G, E]; with dout the gradients.

    Args:
        bounds: left and right, counted from the last query and the last key; None for no bound.
        cap: of the logits; 0 or None for none.
        lse: [H, T] over all keys.
    """
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (k, v))
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    seen = torch.ones_like(distance, dtype=torch.bool)
    left, right = bounds
    if left is not None:
        seen &= distance <= left
    if right is not None:
        seen &= distance >= -right
    assert seen.any(1).all(), "a query that sees no key"
    logits = torch.einsum("thd,shd->hts", q, key) * scale
    bent = (logits / cap).tanh() if cap else 0 * logits
    logits = (bent * cap if cap else logits).masked_fill(~seen, -torch.inf)
    if dout is None:
        return torch.einsum("hts,she->the", logits.softmax(-1), value), logits.logsumexp(-1)
    dout, out = dout.double(), out.double()
    weight = (logits - lse[..., None].double()).exp()
    d_weight = torch.einsum("the,she->hts", dout, value)
    d_logits = weight * (d_weight - (dout * out).sum(-1).T[..., None]) * (1 - bent**2) * scale
    d_key = torch.einsum("hts,thd->shd", d_logits, q).unflatten(1, (-1, group)).sum(2)
    d_value = torch.einsum("hts,the->she", weight, dout).unflatten(1, (-1, group)).sum(2)
    return torch.einsum("hts,shd->thd", d_logits, key), d_key, d_value


class StandIn:
    """One version: what all of its functions do."""

    def __init__(self, name: str, called: list):
        self.name = name
        self.called = called

    def check(self, q, k, v, packed, *others):
        """Half precision, one dtype, widths that are taken, lengths that end where tensors do."""
        assert q.dim() == (4 if packed is None else 3)
        for x in (q, k, v, *others):
            assert x.dtype == q.dtype and x.dtype in HALF, (x.dtype, q.dtype)
            assert x.stride(-1) == 1 and all(step % 8 == 0 for step in x.stride()[:-1])
        assert q.shape[-1] == k.shape[-1] and k.shape[:-1] == v.shape[:-1]
        assert q.shape[-2] % k.shape[-2] == 0
        assert max(q.shape[-1], v.shape[-1]) <= 256
        assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0
        assert self.name != FLASH_2 or q.shape[-1] == v.shape[-1]
        if packed is None:
            return
        for ends, longest, x in ((packed[0], packed[2], q), (packed[1], packed[3], k)):
            assert ends.dtype == torch.int32 and ends.is_contiguous()
            assert ends[0] == 0 and ends[-1] == len(x) and longest == ends.diff().max()
        assert len(packed[0]) == len(packed[1])

    def bounds(self, causal, left, right, queries, keys):
        """As the package reads its arguments; queries, keys: of the longest sequence."""
        none = None if self.name == FLASH_4 else -1
        left, right = (None if x is none or x == none else x for x in (left, right))
        assert all(x is None or x >= 0 for x in (left, right))
        if self.name == FLASH_2:  # as many keys as there are count as no bound
            left, right = (None if x is None or x >= keys else x for x in (left, right))
        if self.name == FLASH_3:
            left = None if left is None or left >= keys - 1 else left
            right = None if right is None or right >= queries - 1 else right
        return left, 0 if causal else right

    def parts(self, q, k, packed):
        """Slices of queries and keys of each sequence, the lse's after them."""
        if packed is None:
            for row in range(len(q)):
                yield row, row, row
            return
        edges = (
            zip(packed[0].tolist(), packed[0].tolist()[1:]),
            zip(packed[1].tolist(), packed[1].tolist()[1:]),
        )
        for query, key in zip(*edges, strict=True):
            yield slice(*query), slice(*key), (slice(None), slice(*query))

    def longest(self, q, k, packed):
        return (q.shape[1], k.shape[1]) if packed is None else (packed[2], packed[3])

    def forward(self, q, k, v, scale, cap, causal, left, right, packed=None):
        self.called.append((self.name, "forward", packed is not None))
        self.check(q, k, v, packed)
        bounds = self.bounds(causal, left, right, *self.longest(q, k, packed))
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        shape = (q.shape[0], q.shape[2], q.shape[1]) if packed is None else q.shape[1::-1]
        lse = torch.empty(shape)
        for query, key, place in self.parts(q, k, packed):
            out[query], lse[place] = attend(q[query], k[key], v[key], scale, bounds, cap)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, into, scale, cap, causal, left, right, packed=None):
        self.called.append((self.name, "backward", packed is not None))
        self.check(q, k, v, packed, dout, out)
        assert out.shape == dout.shape == (*q.shape[:-1], v.shape[-1])
        shape = (q.shape[0], q.shape[2], q.shape[1]) if packed is None else q.shape[1::-1]
        assert lse.dtype == torch.float32 and lse.is_contiguous() and lse.shape == shape
        assert lse.isfinite().all()
        bounds = self.bounds(causal, left, right, *self.longest(q, k, packed))
        sums = [torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v)]
        for query, key, place in self.parts(q, k, packed):
            given = lse[place], out[query], dout[query]
            found = attend(q[query], k[key], v[key], scale, bounds, cap, *given)
            for total, place_of, part in zip(sums, (query, key, key), found, strict=True):
                total[place_of] += part
        for x, total, tensor in zip(into, sums, (q, k, v), strict=True):
            assert x.shape == tensor.shape and x.dtype == tensor.dtype and x.is_contiguous()
            x.copy_(total)


def flash_2(it: StandIn) -> dict:
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert not (dropout_p or return_softmax) and alibi_slopes is None
        bounds = causal, window_size_left, window_size_right
        return *it.forward(q, k, v, softmax_scale, softcap, *bounds), None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert not (dropout_p or return_softmax) and alibi_slopes is None
        packed = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        bounds = causal, window_size_left, window_size_right
        return *it.forward(q, k, v, softmax_scale, softcap, *bounds, packed), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert not dropout_p and alibi_slopes is None
        bounds = causal, window_size_left, window_size_right
        it.backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), softmax_scale, softcap, *bounds)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert not dropout_p and alibi_slopes is None
        packed = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        bounds = causal, window_size_left, window_size_right
        it.backward(
            dout, q, k, v, out, softmax_lse, (dq, dk, dv), softmax_scale, softcap, *bounds, packed
        )

    return locals()


def flash_3(it: StandIn) -> dict:
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
        rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        packed = packed_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        bounds = causal, window_size_left, window_size_right
        return *it.forward(q, k, v, softmax_scale, softcap, *bounds, packed), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
        sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        packed = packed_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        bounds = is_causal, window_size_left, window_size_right
        it.backward(
            dout, q, k, v, out, softmax_lse, (dq, dk, dv), softmax_scale, softcap, *bounds, packed
        )

    return locals()


def flash_4(it: StandIn) -> dict:
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None,
        score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None,
        lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None,
        v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # fmt: skip
        packed = packed_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        bounds = causal, window_size_left, window_size_right
        answer, mass = it.forward(q, k, v, softmax_scale, softcap, *bounds, packed)
        return answer, mass if return_lse else None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128,
        num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2,
        V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
        score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
        block_sparse_tensors=None, dlse=None, learnable_sink=None,
    ):  # fmt: skip
        packed = packed_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        bounds = causal, window_size_left, window_size_right
        it.backward(dout, q, k, v, out, lse, (dq, dk, dv), softmax_scale, softcap, *bounds, packed)
        return dq, dk, dv

    return locals()


def packed_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    packed = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if any(x is None for x in packed):
        assert all(x is None for x in packed)
        return None
    return packed


MAKERS = {FLASH_2: flash_2, FLASH_3: flash_3, FLASH_4: flash_4}


@contextmanager
def installed(*names: str, functions: dict | None = None) -> Iterator[list[tuple[str, str, bool]]]:
    """These versions and no others, until the end; tells (version, pass, whether packed) of calls.

    Args:
        functions: in place of those of the stand-in.
    """
    called: list[tuple[str, str, bool]] = []
    roots = {release.module.partition(".")[0] for release in RELEASES.values()}
    before = {key: sys.modules[key] for key in list(sys.modules) if key.split(".")[0] in roots}
    for key in before:
        del sys.modules[key]
    for root in roots:
        sys.modules[root] = None  # not installed
    for name in names:
        parts = RELEASES[name].module.split(".")
        for end in range(1, len(parts)):
            sys.modules[".".join(parts[:end])] = _module(".".join(parts[:end]), {})
        held = MAKERS[name](StandIn(name, called)) if functions is None else functions
        sys.modules[".".join(parts)] = _module(".".join(parts), held)
    given_up = set(releases.GIVEN_UP)
    releases.GIVEN_UP.clear()
    releases.load_release.cache_clear()
    try:
        yield called
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] in roots]:
            del sys.modules[key]
        sys.modules.update(before)
        releases.GIVEN_UP.clear()
        releases.GIVEN_UP.update(given_up)
        releases.load_release.cache_clear()


def _module(name: str, functions: dict) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(functions)
    return module
