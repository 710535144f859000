"""What attention gave in the forward pass, kept for the pass in which its block is computed again.

Activation checkpointing drops what a block computed and computes it a second time in backward.
Under `Tape` everything is
computed twice but attention: its mean and mass, small beside the rest, are kept. So no exchange of
keys is repeated.

Source: Korthikanti et al. 2022 (arXiv:2205.05198) choose by hand what is computed again. Theirs is
attention, which kept its matrix of scores; ours never has one, so attention is the dearest to
compute and the cheapest to keep.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

TapeEntries = tuple[Tensor, ...]


class AttentionReplay:
    """The memory of one leaf. Without a tape nothing is kept.

    Attributes:
        tape: results of the calls of one forward pass, in order.
        place: which of them comes next, while they are played back; None while they are recorded.
    """

    def __init__(self):
        self.tape: list[TapeEntries] | None = None
        self.place: int | None = None

    def replay_or_compute(self, compute: Callable[[], TapeEntries]) -> TapeEntries:
        """What `compute` gives, or gave at this place of the forward pass. To be called where no
        gradient is recorded."""
        if self.tape is None:
            return compute()
        if self.place is None:
            found = compute()
            self.tape.append(tuple(tensor.detach() for tensor in found))
            return found
        self.place += 1
        return tuple(tensor.detach() for tensor in self.tape[self.place - 1])


class AttentionTape:
    """While it is entered, the leaves record or play back; may be entered again.

    Args:
        leaves: the memories of a block's leaves. tapes: one for each of them.
        plays: played back, not recorded.
    """

    def __init__(
        self, leaves: Sequence[AttentionReplay], tapes: Sequence[list[TapeEntries]], plays: bool
    ):
        self.leaves = leaves
        self.tapes = tapes
        self.plays = plays

    def __enter__(self) -> None:
        for leaf, tape in zip(self.leaves, self.tapes, strict=True):
            leaf.tape = tape
            leaf.place = 0 if self.plays else None

    def __exit__(self, *error: object) -> None:
        for leaf in self.leaves:
            leaf.tape = leaf.place = None


def tapes(leaves: Sequence[AttentionReplay]) -> tuple[AttentionTape, AttentionTape]:
    """(what to enter around a forward pass, what to enter around computing it again)."""
    found: list[list[TapeEntries]] = [[] for _ in leaves]
    return AttentionTape(leaves, found, plays=False), AttentionTape(leaves, found, plays=True)
