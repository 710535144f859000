"""Several rows of tokens that one model continues: prompts first, then token by token.

    decoder = TokenDecoder(model)
    logits = decoder.feed([[5, 3, 8], [2]])     # [2, V]: of what follows each prompt
    logits = decoder.feed([[7], [1]])           # one more token in each row

Letters: B rows, T tokens of a piece, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.cache.base import KVCacheFactory
from models.cache.contiguous import Contiguous
from models.cache.decodable import cannot_decode, shortest_piece
from models.cache.decoding_state import DecodingState
from models.layer import hook
from models.micro_batch import MicroBatch
from models.primitives.sequential import SequentialScan
from models.span import PADDING, Span, to_device
from parallel.collectives import Communicator
from parallel.decoding_state import ShardedDecodingState
from parallel.layout import layouts
from parallel.sharding import shard_span

CHUNK = 1024  # tokens of a prompt that are read at once on one device


class TokenDecoder:
    """Rows of one document each, of uneven length, and the state that their next tokens need.

    Args:
        model: tokens [B, T], span -> logits [B, T, V]; as built, or with drivers over the ranks of
            `communicator`. It is put in evaluation mode for each call only by its owner.
        cache: what holds keys and values; contiguous by default.
        communicator: ranks that hold the rows together; every rank makes the same calls.
        policy: layout by which the ranks share the prompt; None: all ranks read it whole.

    Attributes:
        lengths: tokens of each row so far.

    Raises:
        ValueError: the model cannot continue rows token by token, or not with this cache.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCacheFactory | None = None,
        *,
        communicator: Communicator | None = None,
        policy: str | None = None,
    ):
        cache = cache or Contiguous()
        reasons = cannot_decode(model) + cache.misfits(model)
        if reasons:
            raise ValueError("\n".join(reasons))
        cache.prepare(model)
        self.model = model
        self.cache = cache
        self.communicator = communicator
        # What is strictly sequential gains nothing by a prompt that lies over ranks.
        sequential = any(isinstance(module, SequentialScan) for module in model.modules())
        read_whole = communicator is None or sequential or cache.replicated
        self.policy = None if read_whole else policy
        self.lengths: list[int] = []
        self._undisturbed = communicator is None and _undisturbed(model)
        self.longest = longest_document(model)
        self.whole = shortest_piece(model)
        if communicator is None:
            self.state = DecodingState(cache)
        else:
            self.state = ShardedDecodingState(cache, communicator)

    def feed(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Appends tokens to the rows and returns the logits of what follows, [B, V].

        The first call gives the number of rows and their prompts. A row without new tokens has
        logits of 0.

        Raises:
            ValueError: a prompt without tokens, or too short for a prefix that sees all of itself,
                or a row longer than the positions of the model.
        """
        with torch.inference_mode() if self._undisturbed else torch.no_grad():
            return self._fed(pieces)

    def _fed(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        if not self.lengths:
            self._check_prompts(pieces)
            self.lengths = [0] * len(pieces)
        if len(pieces) != len(self.lengths):
            raise ValueError(
                f"{len(pieces)} pieces for {len(self.lengths)} rows; give one for each"
            )
        longest = max(have + len(more) for have, more in zip(self.lengths, pieces, strict=True))
        if self.longest is not None and longest > self.longest:
            raise ValueError(
                f"a row of {longest} tokens, but the model takes {self.longest} in a document; give"
                " fewer tokens"
            )
        if self.policy is not None and not any(self.lengths):
            return self._feed_sharded(pieces)
        most = max(len(piece) for piece in pieces)
        size = max(CHUNK, self.whole)
        total = None
        for start in range(0, most, size):
            logits = self._feed([piece[start : start + size] for piece in pieces])
            total = logits if total is None else total + logits
            if start + size < most:
                # Only the chunk with the last token of a row counts.
                ends = [start < len(piece) <= start + size for piece in pieces]
                total = total * torch.tensor(ends, device=total.device)[:, None]
        assert total is not None
        return total

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order; a row may come several times."""
        index = torch.tensor(list(rows), device=self.device())
        self.state.select(index)
        self.lengths = [self.lengths[row] for row in rows]

    def join(self, other: "TokenDecoder") -> None:
        """Adds the rows of another decoder of this model below its own."""
        self.state.join(other.state)
        self.lengths = self.lengths + other.lengths

    def bytes(self) -> int:
        """Returns the bytes that are reserved on this rank, without addresses."""
        return self.state.bytes()

    def _check_prompts(self, pieces: Sequence[Sequence[int]]) -> None:
        for row, piece in enumerate(pieces):
            if not len(piece):
                raise ValueError(f"prompt {row} has no token; give one or more")
            if len(piece) < self.whole:
                raise ValueError(
                    f"prompt {row} has {len(piece)} tokens, and the first {self.whole} of a"
                    " document see one another; give as many or more"
                )

    def device(self) -> torch.device:
        """Returns the device of the model."""
        return next(self.model.parameters()).device

    def _rows(self, pieces: Sequence[Sequence[int]]) -> tuple[Tensor, Span]:
        """Returns tokens [B, T], padded on the right, and their addresses."""
        device = self.device()
        sizes = [len(piece) for piece in pieces]
        most = max(sizes)
        line = torch.arange(most)
        pos = torch.tensor(self.lengths)[:, None] + line
        if min(sizes) == most:
            tokens = torch.tensor(pieces)
            doc = torch.zeros_like(pos)
        else:
            tokens = torch.zeros_like(pos)
            for row, piece in enumerate(pieces):
                tokens[row, : len(piece)] = torch.as_tensor(piece, dtype=torch.long)
            there = line < torch.tensor(sizes)[:, None]
            doc = torch.where(there, 0, PADDING)
            pos = torch.where(there, pos, 0)
        # Caches and plans read the addresses, which stay on the host too.
        span = Span.of(pos, doc).moved(lambda tensor: to_device(tensor, device))
        return to_device(tokens, device), span

    def _feed(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        tokens, span = self._rows(pieces)
        logits = self.model(MicroBatch(tokens, self.state.attach(span, tokens)))
        self.state.advance()
        self.lengths = [have + len(more) for have, more in zip(self.lengths, pieces, strict=True)]
        if all(len(piece) == tokens.shape[1] for piece in pieces):
            return logits[:, -1]
        last = to_device([len(piece) - 1 for piece in pieces], logits.device)
        some = (last >= 0)[:, None]
        index = last.clamp_min(0)[:, None, None].expand(-1, 1, logits.shape[2])
        # Padding may hold anything: it is replaced, not multiplied by 0.
        return torch.where(some, logits.gather(1, index)[:, 0], 0)

    def _feed_sharded(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        assert self.communicator is not None and self.policy is not None
        size = self.communicator.size
        tokens, span = self._rows(pieces)
        rows = layouts(self.policy, span, size, heads=self.communicator.heads or 1)
        sharded = shard_span(span, rows, self.communicator.rank)
        own = sharded.sharding.shard(tokens, 0)
        logits = self.model(MicroBatch(own, self.state.attach(sharded)))
        self.state.advance()
        self.lengths = [len(piece) for piece in pieces]
        last = to_device([len(piece) - 1 for piece in pieces], logits.device)
        is_last = sharded.valid() & (sharded.pos == last[:, None])
        # One rank has the last token of a row, wherever the layout put it; the others add zeros.
        last_logits = torch.where(is_last[..., None], logits, 0).sum(1)
        sizes = [last_logits.numel()] * size
        parts = self.communicator.all_to_all([last_logits] * size, sizes, "decode logits")
        return torch.stack([part.view(last_logits.shape) for part in parts]).sum(0)


def _undisturbed(model: nn.Module) -> bool:
    """Tells whether nothing but the model itself runs when it is called.

    An engine that gathers parameters before a layer, by hooks, would do so in inference mode, and
    could not train with what it gathered.
    """
    for module in model.modules():
        if module._forward_pre_hooks or module._forward_hooks:
            return False
    return True


def longest_document(model: nn.Module) -> int | None:
    """Returns the most tokens of a document that all layers and positions take; None: no limit."""
    limits: list[int] = []
    for module in model.modules():
        parts: list[Any] = [module, getattr(module, "position", None)]
        limits += [limit for part in parts if (limit := hook(part, "max_length")) is not None]
    return min(limits, default=None)
