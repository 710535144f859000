"""Stand-ins for the GPU's attention kernels: the CPU's, in float64, with what the real ones demand
of their arguments checked."""

import math

import torch

from models.kernels import sdpa_cpu, sdpa_cuda

SCALE = 0.3
GPUS = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
BOUND = {
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}  # half: its own rounding of 1 + a few sums


def tensors(
    queries, keys, heads=4, kv_heads=2, width=6, value=6, dtype=torch.bfloat16, device="cpu"
):
    torch.manual_seed(0)
    shapes = (2, queries, heads, width), (2, keys, kv_heads, width), (2, keys, kv_heads, value)
    query, key, value = (torch.randn(*shape) for shape in shapes)
    # SCALE is one for all widths: wide heads get smaller queries, as a model's scale would make
    # them, or logits grow with the width and half precision loses more than BOUND allows
    query = query * min(1.0, 16 / width) ** 0.5
    return [x.to(device, dtype) for x in (query, key, value)]


def stand_in(monkeypatch):
    """All kernels of sdpa_cuda by the CPU's; returns a list that tells who was called."""
    called = []

    def loadable(*some, step=sdpa_cuda.ALIGN):
        for x in some:
            assert x.stride(-1) == 1 and all(
                s % step == 0 for s in (x.storage_offset(), *x.stride()[:-1])
            )

    def gapless(*some):
        assert all(x.transpose(1, 2).is_contiguous() for x in some)

    def wide(x):
        return None if x is None else x.double().contiguous()

    def attend(q, k, v, bias, triangle, scale):
        width = max(q.shape[-1], v.shape[-1])
        q, k, v = (torch.nn.functional.pad(wide(x), (0, width - x.shape[-1])) for x in (q, k, v))
        return sdpa_cpu._forward(q, k, v, 0.0, triangle, attn_mask=wide(bias), scale=scale)

    def adjoint(d, q, k, v, bias, out, lse, triangle, scale):
        width = max(q.shape[-1], v.shape[-1])
        some = [
            torch.nn.functional.pad(wide(x), (0, width - x.shape[-1])) for x in (d, q, k, v, out)
        ]
        grads = sdpa_cpu._backward(
            *some, wide(lse), 0.0, triangle, attn_mask=wide(bias), scale=scale
        )
        return [g[..., : x.shape[-1]] for g, x in zip(grads, (q, k, v))]

    def flash(q, k, v, dropout, triangle, debug, *, scale):
        called.append("flash")
        loadable(q, k, v)
        assert (
            q.dtype == k.dtype == v.dtype
            and q.dtype in sdpa_cuda.HALF
            and q.shape[-1] == k.shape[-1] == v.shape[-1]
        )
        return attend(q, k, v, None, triangle, scale)

    def flash_backward(
        d,
        q,
        k,
        v,
        out,
        lse,
        cum_q,
        cum_k,
        longest_q,
        longest_k,
        dropout,
        triangle,
        seed,
        offset,
        *,
        scale,
    ):
        loadable(d, q, k, v, out)
        assert (
            lse.is_contiguous()
            and lse.shape == q.shape[:3]
            and (longest_q, longest_k) == (q.shape[2], k.shape[2])
        )
        return adjoint(d, q, k, v, None, out, lse, triangle, scale)

    def efficient(q, k, v, bias, with_mass, dropout, triangle, *, scale):
        called.append("efficient")
        loadable(q, k, v)
        assert (
            with_mass and q.dtype == k.dtype == v.dtype and q.shape[1] == k.shape[1] == v.shape[1]
        )
        if bias is not None:
            loadable(bias, step=sdpa_cuda.BIAS_ALIGN)
            assert bias.dtype == q.dtype and bias.shape == (*q.shape[:3], k.shape[2])
        mean, lse = attend(q, k, v, bias, triangle, scale)
        full = math.ceil(q.shape[2] / 32) * 32
        return mean[..., : v.shape[-1]], torch.nn.functional.pad(
            lse, (0, full - q.shape[2]), value=torch.inf
        )

    def efficient_backward(
        d, q, k, v, bias, out, lse, seed, offset, dropout, wanted, triangle, *, scale
    ):
        loadable(d, q, k, v, out)
        gapless(d, out)
        assert (
            lse.shape[2] % 32 == 0 and lse.is_contiguous() and wanted == [True, True, True, False]
        )
        assert (lse[..., q.shape[2] :] == torch.inf).all() and lse[
            ..., : q.shape[2]
        ].isfinite().all()
        return *adjoint(d, q, k, v, bias, out, lse[..., : q.shape[2]], triangle, scale), None

    def cudnn(q, k, v, bias, with_mass, dropout, triangle, debug, *, scale):
        called.append("cudnn")
        loadable(q, k, v)
        assert with_mass and bias is None and q.dtype == k.dtype == v.dtype
        assert q.dtype in sdpa_cuda.HALF
        mean, lse = attend(q, k, v, None, triangle, scale)
        return mean[..., : v.shape[-1]], lse[..., None].float()

    def cudnn_backward(
        d, q, k, v, out, lse, seed, offset, bias, ends_q, ends_k, most_q, most_k, *rest, scale
    ):
        loadable(d, q, k, v, out)
        gapless(d, out)
        assert lse.shape == (*q.shape[:3], 1) and lse.dtype == torch.float32
        assert (most_q, most_k) == (q.shape[2], k.shape[2])
        return adjoint(d, q, k, v, None, out, lse[..., 0], rest[1], scale)

    def packed_flash(q, k, v, ends_q, ends_k, most_q, most_k, dropout, triangle, debug, **given):
        called.append("packed")
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and ends_q.dtype == torch.int32
        assert all(x.is_contiguous() for x in (q, k, v)) and most_q == ends_q.diff().max()
        outs = [
            attend(*(x[None].transpose(1, 2) for x in some), hidden, False, given["scale"])
            for *some, hidden in stretches(q, k, v, ends_q, ends_k, triangle, given)
        ]
        mean = torch.cat([mean[0].transpose(0, 1) for mean, _ in outs])
        return mean, torch.cat([lse[0] for _, lse in outs], 1).float()

    def packed_flash_backward(
        d, q, k, v, out, lse, ends_q, ends_k, most_q, most_k, dropout, triangle, *state, **given
    ):
        assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
        found = []
        for number, (*some, hidden) in enumerate(
            stretches(q, k, v, ends_q, ends_k, triangle, given)
        ):
            here = slice(*ends_q[number : number + 2].tolist())
            rows = [x[None].transpose(1, 2) for x in (d[here], *some, out[here])]
            grads = adjoint(*rows[:4], hidden, rows[4], lse[None, :, here], False, given["scale"])
            found.append([g[0].transpose(0, 1) for g in grads])
        return [torch.cat(some) for some in zip(*found)]

    def stretches(q, k, v, ends_q, ends_k, triangle, given):
        for number in range(len(ends_q) - 1):
            query = slice(*ends_q[number : number + 2].tolist())
            key = slice(*ends_k[number : number + 2].tolist())
            ahead = (ends_k.diff() - ends_q.diff())[number]
            places = torch.arange(query.stop - query.start)[:, None] + ahead
            distances = places - torch.arange(key.stop - key.start)
            left, right = given.get("window_size_left"), given.get("window_size_right")
            right = 0 if triangle else right
            # What the real kernels take for no bound, over all stretches of a call.
            most_k = int(ends_k.diff().max())
            left, right = (None if x is None or x >= most_k else x for x in (left, right))
            seen = torch.ones_like(distances, dtype=torch.bool)
            if left is not None and left >= 0:
                seen &= distances <= left
            if right is not None and right >= 0:
                seen &= distances >= -right
            hidden = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
            yield q[query], k[key], v[key], hidden

    for one in (flash, flash_backward, efficient, efficient_backward):
        monkeypatch.setattr(sdpa_cuda, one.__name__, one)
    for one in (cudnn, cudnn_backward, packed_flash, packed_flash_backward):
        monkeypatch.setattr(sdpa_cuda, one.__name__, one)
    return called
