"""Attention in groups of heads: queries, keys and values of a few heads exist at a time.

Each group projects the tokens for its own heads, attends under whatever driver serves, and adds its
share of the output; only the tokens themselves are kept, and a group is computed again in backward.
At a million tokens the queries, keys, values and their wide gradients of all heads are most of what
a layer needs; with N groups they are one Nth. The price is one more forward pass of the attention.

Source: Untied Ulysses (arXiv:2602.21196), which deals heads out to the ranks group by group. Ours
serves every method, and one device too; the projections are cut with the heads.

Letters: B rows, T tokens of a row on this rank, H query heads, G key heads, D head width, N groups.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from models.attention.full import Attention
from models.primitives.softmax import Softmax
from models.scores import Score
from models.span import Span

QUERY_SIDE = ("q", "gate")  # layers whose outputs are query heads
KEY_SIDE = ("k", "v")
BACK = "out"  # its inputs are query heads
BY_CHANNEL = ("q_norm", "k_norm")  # one gain for each channel of a head, the same for all heads
TABLES = "tables"  # what a score learns: cut where it is handed over


def apply_head_groups(model: nn.Module, groups: int) -> int:
    """Has the attention layers of a model computed in groups of heads.

    Layers that are no plain attention over heads are left as they are, and so is decoding.

    Args:
        model: after its primitives have been replaced by drivers, before its blocks are
            checkpointed or sharded.
        groups: N.

    Returns:
        the number of layers that are.
    """
    count = 0
    for layer in groupable_layers(model):
        if unequal_groups(layer, groups) is None:
            layer.forward = HeadGroups(layer, groups)
            count += 1
    return count


def groupable_layers(model: nn.Module) -> Iterator[Attention]:
    """Yields the attention layers whose parameters all belong to heads or serve all heads."""
    known = {*QUERY_SIDE, *KEY_SIDE, BACK, *BY_CHANNEL, TABLES}
    for layer in model.modules():
        if not isinstance(layer, Attention) or type(layer).payload is not Attention.payload:
            continue
        # A memory beside or before the layer reads all heads at once.
        if layer.beside is not None or layer.recall is not None:
            continue
        if {name.partition(".")[0] for name, _ in layer.named_parameters()} <= known:
            yield layer


def unequal_groups(layer: Attention, groups: int) -> str | None:
    """Returns why the heads of a layer do not make so many equal groups; None where they do."""
    heads = layer.q.out_features // layer.head_width
    kv_heads = layer.k.out_features // layer.head_width
    if heads % groups:
        return f"{heads} heads do not divide into {groups} groups"
    if kv_heads % groups and groups % kv_heads:
        return f"{kv_heads} key heads neither divide into {groups} groups nor divide {groups}"
    return None


class HeadGroups:
    """The forward of an attention layer, group by group."""

    def __init__(self, layer: Attention, groups: int):
        self.whole = layer.forward
        self.layer = layer
        self.groups = groups
        self.heads = layer.q.out_features // layer.head_width
        self.kv_heads = layer.k.out_features // layer.head_width
        # Never a child of the model: names of parameters stay.
        self.parts = [_HeadGroup(layer, *self._query_heads(number)) for number in range(groups)]

    def __call__(
        self, hidden: Tensor, span: Span, norm: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """[B, T, width] -> [B, T, width]; see SplitAttention.forward."""
        if span.past is not None:
            return self.whole(hidden, span, norm)
        if norm is not None:
            hidden = norm(hidden)
        output = None
        for number in range(self.groups):
            if torch.is_grad_enabled():
                part = checkpoint(
                    self._attend,
                    number,
                    hidden,
                    span,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                part = self._attend(number, hidden, span)
            output = part if output is None else output.add_(part)
        assert output is not None
        return output

    def _attend(self, number: int, hidden: Tensor, span: Span) -> Tensor:
        """Returns what the heads of one group add to the output, [B, T, width]."""
        parameters = dict(self._parameters(number))
        return functional_call(self.parts[number], parameters, (hidden, span))

    def _query_heads(self, number: int) -> tuple[int, int]:
        each = self.heads // self.groups
        return number * each, (number + 1) * each

    def _key_heads(self, number: int) -> tuple[int, int]:
        if self.kv_heads % self.groups == 0:
            each = self.kv_heads // self.groups
            return number * each, (number + 1) * each
        head = number * self.kv_heads // self.groups
        return head, head + 1

    def _parameters(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters of a group: slices of those of the layer."""
        width = self.layer.head_width
        query = slice(*(head * width for head in self._query_heads(number)))
        key = slice(*(head * width for head in self._key_heads(number)))
        for name in (*QUERY_SIDE, *KEY_SIDE):
            if isinstance(layer := getattr(self.layer, name, None), nn.Linear):
                rows = query if name in QUERY_SIDE else key
                yield from _prefixed(name, _some_outputs(layer, rows))
        yield from _prefixed(BACK, _some_inputs(self.layer.out, query, first=number == 0))


class _HeadGroup(nn.Module):
    """Runs an attention layer with the parameters of some of its heads."""

    def __init__(self, layer: Attention, first: int, last: int):
        super().__init__()
        self.layer = layer
        self.score = _softmax_of(layer).score
        self.first = first
        self.last = last

    def forward(self, hidden: Tensor, span: Span) -> Tensor:
        mix = self.layer.mix
        served = mix.forward
        mix.forward = partial(_mix_of_heads, served, self.score, self.first, self.last)
        try:
            payload = self.layer.payload(hidden, span)
            return self.layer.attend(hidden, span, payload, span)
        finally:
            mix.forward = served


def _mix_of_heads(
    served: Callable[..., Tensor],
    score: Score,
    first: int,
    last: int,
    query: Any,
    payload: Any,
    params: Any = (),
    **addresses: Any,
) -> Tensor:
    """Calls a Softmax or its driver for heads first .. last - 1 of the layer."""
    own = []
    for param, dim in zip(params, score.param_heads, strict=True):
        own.append(param if dim is None else param.narrow(dim, first, last - first))
    heads = torch.arange(first, last, device=query[0].device)
    return served(query, payload, own, heads=heads, **addresses)


def _prefixed(name: str, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for leaf, tensor in parameters.items():
        yield f"layer.{name}.{leaf}", tensor


def _some_outputs(layer: nn.Linear, rows: slice) -> dict[str, Tensor]:
    """Returns the parameters of a linear layer, with an adapter or without, for some outputs."""
    parameters = dict(layer.named_parameters(recurse=False))
    return {
        name: tensor if name == "lora_A" else tensor[rows] for name, tensor in parameters.items()
    }


def _some_inputs(layer: nn.Linear, columns: slice, *, first: bool) -> dict[str, Tensor]:
    """Returns the parameters of a linear layer, with an adapter or without, for some inputs.

    Args:
        first: whether these are the inputs that the bias is added with.
    """
    found = {}
    for name, tensor in layer.named_parameters(recurse=False):
        if name in ("weight", "lora_A"):
            found[name] = tensor[:, columns]
        elif name == "bias" and not first:
            found[name] = torch.zeros_like(tensor)
        else:
            found[name] = tensor
    return found


def _softmax_of(layer: Attention) -> Softmax:
    """Returns the primitive of an attention layer, below its driver."""
    core: Any = layer.mix
    while not isinstance(core, Softmax):
        core = core.core
    return core
