"""Batches of a mixture: each row is one of a source, chosen by the tokens given so far.

Letters: R rows of a batch, T context length.
"""

import hashlib
from collections.abc import Mapping

import torch

from models.loss import IGNORE
from models.span import PADDING, TEXT
from trainer.data.apportion import Ledger, account, next_source, retire
from trainer.data.batch import Batch, first_numbers
from trainer.data.cursors import misfit
from trainer.data.errors import NONE_HELD_OUT, DataError
from trainer.data.sources.mixture import Mixture
from trainer.data.streams.base import Cursor, OwnRows, RowSize, Stream, StreamOfRows
from trainer.data.streams.packed import PackedStream
from trainer.errors import BAD_CONFIG


class MixtureStream(StreamOfRows):
    """Rows of several streams, in shares that hold to within one row at any time.

    A cursor holds one of each source, and what each has given and should have given. It counts rows
    and tokens of the whole run, so it is valid on any number of ranks.

    Held-out documents come in the shares of step 0; each source is read once, and the others take
    over. Sources that hold nothing out are left out.

    Args:
        source: the mixture.
        streams: by name, of one row a batch; under held_out of the sources that hold something out.
        by_source: streams of R rows of the same held-out documents, for losses by source.
        context_length, rows, split: see open_stream.

    Attributes:
        by_source: see above; empty for training data.
    """

    def __init__(
        self,
        source: Mixture,
        streams: Mapping[str, Stream],
        *,
        context_length: int,
        rows: int,
        split: str,
        by_source: Mapping[str, Stream] | None = None,
    ):
        if not streams:
            raise DataError(NONE_HELD_OUT, BAD_CONFIG)
        self.source = source
        self.streams = dict(streams)
        self.by_source: Mapping[str, Stream] = dict(by_source or {})
        self.context_length = context_length
        self.rows = rows
        self.split = split
        self.tokenizer = source.tokenizer()
        self.vocabulary = self.tokenizer.vocabulary
        self.pauses = any(stream.pauses for stream in streams.values())
        self.limits = {name: self._limit(name, stream) for name, stream in streams.items()}
        limits = [limit for limit in self.limits.values() if limit is not None]
        self.batches: int | None = None
        if len(limits) == len(self.limits):
            self.batches = -(-sum(limits) // rows)
        fingerprints = {name: stream.fingerprint for name, stream in streams.items()}
        points = {name: source.weights.points[name] for name in streams}
        # The rows of a step decide at which row a weight changes.
        step = None if source.weights.constant else rows
        identity = f"{split} {fingerprints} {points} {self.limits} {context_length} {step}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()

    def start(self) -> Cursor:
        """See Stream.start."""
        return {
            "rows": 0,
            "sources": {name: stream.start() for name, stream in self.streams.items()},
            "given": dict.fromkeys(self.streams, 0),
            "wished": dict.fromkeys(self.streams, 0.0),
            "ended": dict.fromkeys(self.streams, 0),
            "fingerprint": self.fingerprint,
        }

    def follow(self, cursor: Cursor) -> Cursor:
        """See Stream.follow; sources that the other mixture had too are read on where it ended."""
        beginning = self.start()
        others = cursor.get("sources")
        for name, stream in self.streams.items():
            other = others.get(name) if isinstance(others, dict) else None
            if not isinstance(other, dict) or other.get("fingerprint") != stream.fingerprint:
                continue
            if misfit(stream.start(), other) is None:
                beginning["sources"][name] = other
                limit = self.limits[name]
                beginning["ended"][name] = int(limit is not None and other["rows"] >= limit)
        return beginning

    def read_rows(self, cursor: Cursor, first: int, last: int) -> OwnRows:
        """See Stream.read_rows; of the other rows the sizes are needed, to share out tokens."""
        self.admit(cursor)
        # A rank without rows reads one to know how its padding looks.
        start = min(first, self.rows - 1)
        sources = dict(cursor["sources"])
        ended = dict(cursor["ended"])
        ledger = Ledger(cursor["given"], cursor["wished"])
        step = cursor["rows"] // self.rows if self.split == "train" else 0
        parts: list[Batch] = []
        counts: list[int] = []  # of the documents of each row
        while len(counts) < self.rows:
            is_own = start <= len(counts) < last
            live = [name for name in self.streams if not ended[name]]
            shares = self.source.weights.shares(step, live)
            if not any(shares.values()):
                parts += [self._nothing(cursor["rows"] + len(counts))] if is_own else []
                counts.append(0)
                continue
            name = next_source(ledger, shares, self.context_length)
            batch, size = self._row(self.streams[name], sources[name], is_own)
            tokens, documents, after = size
            # A streamed source tells by an empty row that its held-out documents are over.
            if tokens:
                parts += [] if batch is None else [batch]
                counts.append(documents)
                sources[name] = after
                ledger = account(ledger, shares, name, tokens)
            limit = self.limits[name]
            if not tokens or (limit is not None and after["rows"] >= limit):
                ended[name] = 1
                live.remove(name)
                ledger = retire(ledger, self.source.weights.shares(step, live), name)
        following = {
            "rows": cursor["rows"] + self.rows,
            "sources": sources,
            "given": ledger.given,
            "wished": ledger.wished,
            "ended": ended,
            "fingerprint": self.fingerprint,
        }
        batch = _joined(parts).part(first - start, last - start)
        return OwnRows(batch, following, first_numbers(torch.tensor(counts)[:, None], first, last))

    def _row(self, stream: Stream, cursor: Cursor, is_own: bool) -> tuple[Batch | None, RowSize]:
        """Returns the next row of a source with its size; None for one of another rank whose size
        is known without reading it."""
        size = None if is_own else stream.row_size(cursor)
        if size is not None:
            return None, size
        batch, after = stream.read(cursor)
        tokens = int((batch.doc[:, :-1] >= 0).sum())
        return batch if is_own else None, RowSize(tokens, int(batch.doc.max()) + 1, after)

    def describe(self, steps: int | None = None) -> str:
        """See Stream.describe."""
        first = self.source.weights.shares(0, list(self.streams))
        parts: list[str] = []
        for name, stream in self.streams.items():
            share = f"{name} ({first[name]:.4g} of the tokens"
            if self.split == "train" and not self.source.weights.constant:
                share += " at step 0"
            if self.limits[name] is not None:
                share += f", {self.limits[name]} rows at most"
            parts.append(f"{share}): {stream.describe()}")
        return f"mixture of {len(parts)} sources; {'; '.join(parts)}"

    def progress(self, cursor: Cursor) -> str:
        """See Stream.progress."""
        total = max(sum(cursor["given"].values()), 1)
        parts: list[str] = []
        for name, stream in self.streams.items():
            tokens = cursor["given"][name]
            words = f"{name} gave {tokens} tokens ({tokens / total:.4f}"
            if isinstance(stream, PackedStream):
                words += f"; read {cursor['sources'][name]['rows'] / stream.epoch_rows:.2f} times"
            if cursor["ended"][name]:
                words += "; used up"
            parts.append(f"{words})")
        return ", ".join(parts)

    def _limit(self, name: str, stream: Stream) -> int | None:
        """Returns the rows that a source gives at most; None for any number."""
        if self.split != "train":
            return stream.batches
        times = self.source.epochs.get(name)
        if times is None or not isinstance(stream, PackedStream):
            return None
        return max(1, round(times * stream.epoch_rows))

    def _nothing(self, row: int) -> Batch:
        """Returns a row of padding behind the last held-out one.

        Raises:
            DataError: training data is used up.
        """
        if self.split == "train":
            raise DataError(
                f"data.epochs: every source is used up after {row} rows"
                f" ({row // self.rows} steps); raise an entry of data.epochs, or train for fewer"
                " steps",
                BAD_CONFIG,
            )
        length = self.context_length + 1
        columns = [torch.full((1, length), value) for value in (0, PADDING, 0, TEXT)]
        aims = torch.full((1, length), IGNORE) if self.source.aimed else None
        return Batch(*columns, aims=aims)


def _joined(parts: list[Batch]) -> Batch:
    """Returns the rows of batches below one another."""
    aims = [part.aims for part in parts if part.aims is not None]
    return Batch(
        tokens=torch.cat([part.tokens for part in parts]),
        doc=torch.cat([part.doc for part in parts]),
        pos=torch.cat([part.pos for part in parts]),
        role=torch.cat([part.role for part in parts]),
        aims=torch.cat(aims) if aims else None,
    )
