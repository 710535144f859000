"""Cross-entropy in chunks of tokens: logits [tokens, vocabulary] never exist whole, forward or
backward.

Letters: N tokens (rows and positions together), W width, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # the target of a token that has none

CHUNK_SCORES = 1 << 22  # logits held at once
CHUNK_TOKENS = 1024  # at least: every chunk reads all weights and the sum of their gradients
ONE_WEIGHT = "token_losses takes one weight for all tokens; sum the losses, or scale their sum"


def chunk_starts(tokens: int, step: int) -> Iterable[int]:
    """Returns the first token of each chunk. A plan of a step takes fewer, as all are alike."""
    return range(0, tokens, step)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap tanh(logits / cap) (Gemma 2, arXiv:2408.00118); None: the logits as they are."""
    if cap is None:
        return logits
    return (logits / cap).tanh() * cap


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    cap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """[B, T] nats per token, 0 where the target is IGNORE; float32, or float64 where `hidden` is.

    Args:
        hidden: [B, T, W] what the last layer gives.
        weight: [V, W] of the output head.
        targets: [B, T] int64.
        cap: see `capped`.
        bias: [V] of the output head, added before the cap.

    The gradient is computed with the loss, chunk by chunk, and scaled in backward: every token's
    loss must therefore get the same upstream gradient (a sum or a mean), which is checked.
    """
    return _TokenLosses.apply(hidden, weight, targets, cap, bias)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = any(ctx.needs_input_grad)
        # what is handed out is no view: FSDP2 hooks it
        ctx.shape = hidden.shape
        shape = targets.shape
        hidden = hidden.flatten(0, 1)
        targets = targets.flatten()
        losses = hidden.new_zeros(targets.shape, dtype=wide)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wanted else None
        d_bias = torch.zeros_like(bias, dtype=wide) if wanted and bias is not None else None
        step = max(CHUNK_TOKENS, CHUNK_SCORES // weight.shape[0])
        for start in chunk_starts(len(targets), step):
            part = slice(start, start + step)
            valid = targets[part] != IGNORE
            if not (wanted or valid.is_meta or valid.any()):
                # The first pass over a row in pieces wants what layers leave, and no loss.
                continue
            target = targets[part].clamp_min(0)[:, None]
            scores = (hidden[part] @ weight.T).to(wide)
            logits = capped(scores if bias is None else scores + bias.to(wide), cap)
            bent = None if cap is None or not wanted else 1 - (logits / cap).square()
            lse = logits.logsumexp(-1)
            losses[part] = (lse - logits.gather(1, target)[:, 0]) * valid
            if d_hidden is not None and d_weight is not None:
                slope = (
                    logits.sub_(lse[:, None])
                    .exp_()
                    .scatter_add_(1, target, torch.full_like(lse, -1.0)[:, None])
                )
                if bent is not None:
                    slope = slope * bent
                slope = (slope * valid[:, None]).to(hidden.dtype)
                d_hidden[part] = slope @ weight
                d_weight += (slope.T @ hidden[part]).to(wide)
                if d_bias is not None:
                    d_bias += slope.sum(0, dtype=wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtype = weight.dtype
        return losses.reshape(shape).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale = grad.flatten()[0] if grad.numel() else grad.new_zeros(())
        # The gradient of a sum is one number, repeated without memory; a device need not be asked.
        repeated = all(step == 0 or size == 1 for step, size in zip(grad.stride(), grad.shape))
        if not repeated and grad.is_cpu and not bool((grad == scale).all()):
            raise ValueError(ONE_WEIGHT)
        if not repeated and not grad.is_cpu:
            # The device looks, and stops where it finds another: nobody waits for the answer.
            torch.ops.aten._assert_async.msg((grad == scale).all(), ONE_WEIGHT)
        return (
            (d_hidden * scale.to(d_hidden.dtype)).view(ctx.shape),
            (d_weight * scale).to(ctx.dtype),
            None,
            None,
            None if d_bias is None else (d_bias * scale).to(ctx.dtype),
        )
