"""Addresses of tokens: position inside the document, number of the document, and role.

Letters: B rows, T tokens.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Derived = TypeVar("Derived")

# Roles of tokens. GIVEN marks tokens that are not predicted; only batches use it. IMAGE and SOUND
# are patches and frames, which come as values and not as numbers of words.
TEXT, PREFIX, GLOBAL, READ, WRITE, GIVEN, IMAGE, SOUND = range(8)
LAST_ROLE = SOUND
PADDING = -1  # the document number of padding


def to_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Copies numbers of the host to a device, and waits neither for what it computes nor for the
    copy.

    `torch.tensor(numbers, device=...)` and `.to(device)` wait for all that was queued before.

    Args:
        values: a tensor, an array, or numbers in lists; what is on the device already stays.
        dtype: of the result; None = that of the values.
    """
    if not isinstance(values, Tensor):
        # Whatever the default device is: one without numbers could not be copied from.
        values = torch.as_tensor(values, dtype=dtype, device="cpu")
    elif dtype is not None:
        values = values.to(dtype)
    on_host = values.device.type == "cpu"
    if on_host and torch.device(device).type == "cuda" and not torch.compiler.is_compiling():
        values = values.pin_memory()
    return values.to(device, non_blocking=on_host)


class DerivedCache:
    """Results that follow from addresses, built once and shared by the layers of a pass.

    The only place that knows about ids: an entry holds the objects that it was derived from, so
    that no id can be given to another object while the entry lives.
    """

    def __init__(self):
        self._entries: dict[Hashable, tuple[tuple[object, ...], Any]] = {}

    def get(self, key: Hashable, build: Callable[[], Derived], *sources: object) -> Derived:
        """Returns the result under a key, built when it is first asked for.

        Args:
            key: says what is derived, and with which settings.
            build: computes it.
            sources: objects beside the key that the result depends on, told apart by identity;
                spans that share a cache, because they differ in their past alone, are one.
        """
        full_key = key, *(id(s.cache if isinstance(s, Span) else s) for s in sources)
        entry = self._entries.get(full_key)
        if entry is None:
            entry = sources, build()
            self._entries[full_key] = entry
        return entry[1]


class Span:
    """The addresses of the tokens a module computes, however the sequence was sharded.

    Model code reads addresses from here and never derives them from a rank, so the same forward
    pass is right for a whole sequence, a shard, several pieces of a sequence, or one decoded token.
    A span is never changed; methods return others. It is no dataclass, because FSDP2 rebuilds the
    dataclasses among a module's arguments, and a copy would lose what layers share.

    Attributes:
        pos: [B, T] int64, index of the token in its own document; 0 opens one.
        doc: [B, T] int64, number of the document, different for each document of a row (in
            training: of a step); PADDING marks tokens that are invisible to all.
        role: [B, T] int64, TEXT, PREFIX, GLOBAL, READ, WRITE, IMAGE or SOUND.
        sharding: how the row was sharded over ranks (a parallel.sharding.SequenceSharding); None if
            it was not. Opaque in models/.
        past: the state carried from earlier rows of these lanes (a
            models.carried_state.CarriedState); None if nothing is carried.
        cache: what layers derive from these addresses, such as the blocks that a mask needs.
        copy: the same addresses on the CPU; None where they are there, or were not asked for yet.
    """

    def __init__(
        self,
        pos: Tensor,
        doc: Tensor,
        role: Tensor,
        sharding: Any = None,
        *,
        past: Any = None,
        cache: DerivedCache | None = None,
        copy: "Span | None" = None,
    ):
        self.pos = pos
        self.doc = doc
        self.role = role
        # Any: drivers use all of a SequenceSharding, and parallel/ is not known here.
        self.sharding = sharding
        self.past = past
        self.cache = DerivedCache() if cache is None else cache
        self.copy = copy

    def __repr__(self) -> str:
        return f"Span(pos={self.pos}, doc={self.doc}, role={self.role})"

    @staticmethod
    def of(pos: Tensor, doc: Tensor, role: Tensor | None = None) -> "Span":
        """Creates a span; `role` defaults to TEXT everywhere."""
        if role is None:
            role = torch.full_like(pos, TEXT)
        return Span(pos, doc, role)

    @staticmethod
    def line(rows: int, tokens: int, device: Any = None) -> "Span":
        """Creates a span with one unbroken document per row."""
        pos = torch.arange(tokens, device=device).expand(rows, tokens)
        return Span.of(pos, torch.zeros_like(pos))

    def map(self, move: Any) -> "Span":
        """Applies `move` ([B, T] -> [B, T']) to pos, doc and role.

        The result has no sharding: `move` may select or reorder tokens, and the sharding describes
        the original ones.
        """
        return Span(move(self.pos), move(self.doc), move(self.role))

    def cut(self, part: Any) -> "Span":
        """As `map`, for a `part` that slices or reshapes; the copy on the host is cut too."""
        there = self.map(part)
        if self.copy is not None:
            there.copy = self.copy.map(part)
        return there

    def host(self) -> "Span":
        """The same addresses on the CPU, where plans read them; copied at most once."""
        if self.pos.device.type == "cpu":
            return self
        if self.copy is None:
            self.copy = self.map(lambda tensor: tensor.detach().cpu())
        return self.copy

    def moved(self, move: Any) -> "Span":
        """The same addresses on another device, to which `move` copies a tensor; no plan of them
        waits for that device."""
        there = self.map(move)
        there.copy = self.host()
        return there

    def with_pos(self, pos: Tensor) -> "Span":
        """The same tokens at other positions, in the same sharding."""
        return Span(pos, self.doc, self.role, self.sharding, past=self.past)

    def with_doc(self, doc: Tensor) -> "Span":
        """The same tokens in other documents, in the same sharding."""
        return Span(self.pos, doc, self.role, self.sharding, past=self.past)

    def with_sharding(self, sharding: Any) -> "Span":
        """The same addresses with another sharding, and nothing derived yet."""
        return Span(self.pos, self.doc, self.role, sharding, past=self.past, copy=self.copy)

    def with_past(self, past: Any) -> "Span":
        """The same addresses with another past; what was derived from them stays."""
        place = self.sharding
        return Span(
            self.pos, self.doc, self.role, place, past=past, cache=self.cache, copy=self.copy
        )

    def fresh(self) -> "Span":
        """The same addresses, with nothing derived from them yet."""
        return self.with_sharding(self.sharding)

    def join(self, other: "Span") -> "Span":
        """Concatenates these addresses and others of the same rows, and their shardings too."""
        pos = torch.cat([self.pos, other.pos], 1)
        doc = torch.cat([self.doc, other.doc], 1)
        role = torch.cat([self.role, other.role], 1)
        sharding = None if self.sharding is None else self.sharding.join(other.sharding)
        return Span(pos, doc, role, sharding)

    def cast(self, role: int) -> "Span":
        """The same tokens, all with this role, on every rank that has a shard of them."""
        sharding = None if self.sharding is None else self.sharding.cast(role)
        return Span(self.pos, self.doc, torch.full_like(self.role, role), sharding)

    def addresses(self) -> tuple[Tensor, Tensor, Tensor]:
        """(pos, doc, role)."""
        return self.pos, self.doc, self.role

    def opens(self) -> Tensor:
        """[B, T] bool: True where a document begins."""
        return (self.pos == 0) & (self.doc != PADDING)

    def valid(self) -> Tensor:
        """[B, T] bool: False at padding."""
        return self.doc != PADDING

    @property
    def shape(self) -> torch.Size:
        """(B, T)."""
        return self.pos.shape
