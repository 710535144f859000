"""Quantised cache: old keys and values as codes of 2, 4 or 8 bits, the newest as they were made.

The codes are turned back into numbers at every read: it saves memory and costs time.

Letters: B rows, T tokens at hand, S slots, G tokens of a group, R newest tokens in full precision.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.cache.base import KVCache, KVCacheFactory
from models.cache.eviction.base import cached_attentions, taken, widened
from models.cache.quantizer import CHANNELS, TOKENS, Quantized, Quantizer
from models.cache.slots import Placement, SlotTable
from models.cache.turning import Turn, cannot_turn, turns
from models.masks.algebra import Mask
from models.positions.rope import Rope
from models.ranges import Piece, Some
from models.scores import SharedValueScore, Tensors
from models.span import Span

EVERYTHING = Mask()
GROUPINGS = ("channel", "token")


class QuantizedKV(KVCacheFactory):
    """`cache=quantized`: KIVI's cache, keys and values each with their own bits.

    Args:
        key_bits, value_bits: 2, 4 or 8 of a code.
        keys: channel: a scale for each channel and group of tokens; token: a scale for each token
            and group of channels, as values have.
        group: numbers that share a scale; null: all channels of a head (keys: token).
        residual: R; keys become codes R at a time, values one by one once R newer ones have come.
        before_rotation: codes are of keys without their rotation, which each read adds again:
            channels keep their size from token to token.

    Source: Liu et al. 2024, KIVI (arXiv:2402.02750): keys per channel, values per token, scales in
    the dtype of the model. Without rotation: Hooper et al. 2024, KVQuant (arXiv:2401.18079). Unlike
    their code, rows of uneven length stand side by side.
    """

    def __init__(
        self,
        key_bits: int = 4,
        value_bits: int = 4,
        keys: str = "channel",
        group: Piece | None = 32,
        residual: Some = 128,
        *,
        before_rotation: bool = False,
    ):
        if keys not in GROUPINGS:
            raise ValueError(f"cache.keys={keys} is unknown; use {' or '.join(GROUPINGS)}")
        along = TOKENS if keys == "channel" else CHANNELS
        self.key = Quantizer(key_bits, along, group)
        self.value = Quantizer(value_bits, CHANNELS, group)
        if along == TOKENS and residual % self.key_group:
            raise ValueError(
                f"cache.residual={residual} tokens of keys are no whole groups of"
                f" cache.group={group}; use a multiple of {group}"
            )
        self.residual = residual
        self.before_rotation = before_rotation
        self._turns: dict[str, Turn] = {}

    @property
    def key_group(self) -> int:
        """Tokens that become codes together, for keys."""
        return self.key.group or 1 if self.key.along == TOKENS else 1

    def least_bytes(self, tokens: int, numbers: int, itemsize: int) -> int:
        """See KVCacheFactory: codes alone, of fewer bits where keys and values differ."""
        bits = min(self.key.bits, self.value.bits, 8 * itemsize)
        return tokens * numbers * bits // 8

    def misfits(self, model: nn.Module) -> list[str]:
        """See KVCacheFactory."""
        attentions = cached_attentions(model)
        if not attentions:
            return [
                "cache=quantized quantises keys and values, and no layer of this model holds any;"
                " use cache=contiguous"
            ]
        sentences = []
        for path, softmax in attentions.items():
            owner = model.get_submodule(path.rpartition(".")[0])
            if softmax.score.payload_heads != (2, 2):
                sentences.append(
                    f"cache=quantized quantises keys and values, but {path} holds latents or other"
                    " tensors; use cache=contiguous"
                )
                continue
            width = getattr(owner, "head_width", None)
            if width is not None:
                sentences += self._widths_refused(int(width), softmax.score)
            turns_keys = isinstance(getattr(owner, "position", None), Rope)
            if self.before_rotation and not turns_keys:
                sentences.append(
                    f"cache.before_rotation=true: the keys of {path} are not rotated; use"
                    " cache.before_rotation=false"
                )
        if self.before_rotation and not sentences:
            sentences = cannot_turn(model)
        return list(dict.fromkeys(sentences))

    def _widths_refused(self, width: int, score: object) -> list[str]:
        sentences = []
        widths = ((self.key, width), (self.value, width))
        if isinstance(score, SharedValueScore):
            widths = ((self.key, width), (self.value, 2 * width))
        for quantizer, channels in widths:
            try:
                quantizer.check(channels)
            except ValueError as error:
                sentences.append(str(error))
        return sentences

    def prepare(self, model: nn.Module) -> None:
        """See KVCacheFactory."""
        if self.before_rotation:
            self._turns = turns(model)

    def create(self, place: str, mask: Mask, slots: SlotTable) -> "QuantizedCache":
        """See KVCacheFactory."""
        turn = self._turns[place] if self.before_rotation else None
        return QuantizedCache(self, turn)


class QuantizedCache(KVCache):
    """Keys and values of all tokens, those that a window no longer shows too.

    Args:
        settings: bits, groups and residual.
        turn: moves keys to other positions; None: they are quantised as they come.
    """

    def __init__(self, settings: QuantizedKV, turn: Turn | None):
        self.settings = settings
        self.turn = turn
        # a table of its own: groups of tokens stay together, so no slot is given back
        self.slots = SlotTable(EVERYTHING)
        residual = settings.residual
        self.parts = (
            QuantizedPart(settings.key, settings.key_group, residual, whole=True),
            QuantizedPart(settings.value, 1, residual, whole=False),
        )

    def append(self, payload: Tensors, span: Span) -> None:
        """See KVCache."""
        if self.turn is not None:
            payload = self.turn(payload, -span.pos)
        placement = self.slots.place(span)
        for part, came in zip(self.parts, payload, strict=True):
            part.append(came, placement, self.slots.filled)

    def read(self) -> tuple[Tensors, Span]:
        """See KVCache."""
        span = self.slots.read()
        payload: Tensors = [part.read(span.shape[1]) for part in self.parts]
        if self.turn is not None:
            payload = self.turn(payload, span.pos)
        return payload, span

    def select(self, rows: Tensor) -> None:
        """See KVCache."""
        self.slots.select(rows)
        for part in self.parts:
            part.select(rows)

    def join(self, other: Any) -> None:
        """See KVCache."""
        self.slots.join(other.slots)
        for part, theirs in zip(self.parts, other.parts, strict=True):
            part.join(theirs)

    def bytes(self) -> int:
        """See KVCache."""
        return sum(part.bytes() for part in self.parts)

    def export_state(self) -> tuple[Tensors, Span]:
        """See KVCache: numbers, not codes, so any cache takes them.

        Quantised again they give the same codes, because each group holds its own extremes.
        """
        return self.read()

    def import_state(self, payload: Tensors, span: Span) -> None:
        """See KVCache."""
        self.append(payload, span)


class QuantizedPart:
    """One tensor of the payload: codes of the old tokens of each row, and its newest tokens.

    Args:
        quantizer: bits and groups.
        unit: tokens that become codes together.
        residual: R.
        whole: R tokens become codes at once, when there are R; else those beyond R, at each call.

    Attributes:
        coded: for each row the number of tokens in codes.
        codes: dim 1 counts units.
        recent: [B, C, ...]; token `coded` + i of a row at place i.
    """

    def __init__(self, quantizer: Quantizer, unit: int, residual: int, *, whole: bool):
        self.quantizer = quantizer
        self.unit = unit
        self.residual = residual
        self.whole = whole
        self.coded = torch.zeros(0, dtype=torch.long)
        self.codes: Quantized | None = None
        self.recent: Tensor | None = None

    def append(self, came: Tensor, placement: Placement, filled: Sequence[int]) -> None:
        """Takes tokens [B, T, ...]; `filled` is the number of tokens of each row with them."""
        device = came.device
        if self.recent is None:
            self.coded = torch.zeros(came.shape[0], dtype=torch.long, device=device)
            self.recent = came.new_zeros(came.shape[0], 0, *came.shape[2:])
        counts = torch.tensor(list(filled), device=device) - self.coded
        recent = widened(self.recent, int(counts.max()), 0)
        rows, tokens, slots = self._places(came, placement)
        recent[rows, slots - self.coded[rows]] = came[rows, tokens]
        self.recent = recent
        self._move(self._ripe(counts), counts)

    def read(self, slots: int) -> Tensor:
        """Returns the tokens of all slots, [B, S, ...]; numbers of empty ones are finite."""
        assert self.recent is not None, "nothing was appended yet"
        numbers = self.recent.new_zeros(self.recent.shape[0], slots, *self.recent.shape[2:])
        if self.codes is not None:
            old = self.quantizer.dequantize(self.codes)
            numbers[:, : old.shape[1]] = old[:, :slots]
        line = torch.arange(slots, device=numbers.device)
        place = line - self.coded[:, None]
        newest = (place >= 0) & (place < self.recent.shape[1])
        row, slot = newest.nonzero(as_tuple=True)
        numbers[row, slot] = self.recent[row, place[row, slot]]
        return numbers

    def select(self, rows: Tensor) -> None:
        """Keeps these rows."""
        if self.recent is None:
            return
        self.coded = self.coded[rows]
        self.recent = self.recent[rows]
        if self.codes is not None:
            self.codes = Quantized(*[tensor[rows] for tensor in self.codes])

    def join(self, other: "QuantizedPart") -> None:
        """Adds the rows of another below."""
        if self.recent is None or other.recent is None:
            return
        places = max(self.recent.shape[1], other.recent.shape[1])
        both = widened(self.recent, places, 0), widened(other.recent, places, 0)
        rows = self.recent.shape[0], other.recent.shape[0]
        self.recent = torch.cat(both)
        self.coded = torch.cat([self.coded, other.coded])
        units = max(_units(self.codes), _units(other.codes))
        if not units:
            return
        above = self._with_units(self.codes, rows[0], units)
        below = self._with_units(other.codes, rows[1], units)
        together = zip(above, below, strict=True)
        self.codes = Quantized(*[torch.cat(pair) for pair in together])

    def bytes(self) -> int:
        """Returns the bytes of codes, scales, minima and newest tokens."""
        held = 0
        if self.recent is not None:
            held = self.recent.numel() * self.recent.element_size()
        if self.codes is not None:
            held += self.codes.bytes()
        return held

    def _places(self, came: Tensor, placement: Placement) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the row, the place in the piece and the slot of each token."""
        if placement.start is None:
            return placement.rows, placement.tokens, placement.slots
        rows, tokens = came.shape[:2]
        row = torch.arange(rows, device=came.device).repeat_interleave(tokens)
        token = torch.arange(tokens, device=came.device).repeat(rows)
        return row, token, token + placement.start

    def _ripe(self, counts: Tensor) -> Tensor:
        """Returns for each row how many of its newest tokens become codes now, [B]."""
        if self.whole:
            at_once = max(self.residual, self.unit)
            return counts // at_once * at_once
        return (counts - self.residual).clamp_min(0)

    def _move(self, ripe: Tensor, counts: Tensor) -> None:
        """Turns the first `ripe` of the newest tokens of each row into codes."""
        assert self.recent is not None
        if not ripe.any():
            return
        device = ripe.device
        units = ripe // self.unit
        row = torch.arange(len(units), device=device).repeat_interleave(units)
        before = units.cumsum(0) - units
        number = torch.arange(len(row), device=device) - before[row]
        line = torch.arange(self.unit, device=device)
        blocks = self.recent[row[:, None], number[:, None] * self.unit + line]
        came = self.quantizer.quantize(blocks)
        place = self.coded[row] // self.unit + number
        grown = self._with_units(self.codes, len(units), int(place.max()) + 1, came)
        for table, tensor in zip(grown, came, strict=True):
            table[row, place] = tensor[:, 0]
        self.codes = grown
        self.coded = self.coded + ripe
        left = counts - ripe
        order = torch.arange(int(left.max()), device=device) + ripe[:, None]
        self.recent = taken(self.recent, order.clamp_max(self.recent.shape[1] - 1))

    def _with_units(
        self, codes: Quantized | None, rows: int, units: int, like: Quantized | None = None
    ) -> Quantized:
        """Returns codes with at least so many units; new ones are zeros."""
        if codes is not None:
            return Quantized(*[widened(tensor, units, 0) for tensor in codes])
        if like is None:
            assert self.recent is not None
            # of one unit of zeros: the shapes that codes of this payload have
            blank = self.recent.new_zeros(1, self.unit, *self.recent.shape[2:])
            like = self.quantizer.quantize(blank)
        return Quantized(*[tensor.new_zeros(rows, units, *tensor.shape[2:]) for tensor in like])


def _units(codes: Quantized | None) -> int:
    return 0 if codes is None else codes.codes.shape[1]
