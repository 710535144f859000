"""Keeps attention results of the forward pass for the pass in which their block is recomputed.

Activation checkpointing drops what a block computed and computes it a second time in backward.
Under an `AttentionTape` everything is computed twice except attention: its mean and lse, small
beside the rest, are kept. So no exchange of keys is repeated.

Source: Korthikanti et al. 2022 (arXiv:2205.05198) choose by hand what is recomputed. They recompute
attention, whose matrix of scores they would have to keep; ours never has one, so attention is the
most expensive part to compute and the cheapest to keep.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

TapeEntries = tuple[Tensor, ...]


class AttentionReplay:
    """The recorder of one primitive. Without a tape it records nothing.

    Attributes:
        tape: results of the calls of one forward pass, in order.
        place: number of the next result while the tape is played back; None while it is recorded.
    """

    def __init__(self):
        self.tape: list[TapeEntries] | None = None
        self.place: int | None = None

    def replay_or_compute(self, compute: Callable[[], TapeEntries]) -> TapeEntries:
        """Returns the result of `compute`, or the one recorded at this point of the forward pass.

        To be called where no gradient is recorded.
        """
        if self.tape is None:
            return compute()
        if self.place is None:
            result = compute()
            self.tape.append(_detached(result))
            return result
        self.place += 1
        return _detached(self.tape[self.place - 1])


class AttentionTape:
    """A context in which primitives record or play back; it may be entered again.

    Args:
        leaves: the recorders of the primitives of a block.
        tapes: one list of results for each recorder.
        plays: whether results are played back instead of recorded.
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
        # Also after an error: a recorder that kept its tape would grow with every later step.
        for leaf in self.leaves:
            leaf.tape = None
            leaf.place = None


def tapes(leaves: Sequence[AttentionReplay]) -> tuple[AttentionTape, AttentionTape]:
    """Returns (the context of a forward pass, the context of its recomputation)."""
    results: list[list[TapeEntries]] = [[] for _ in leaves]
    recording = AttentionTape(leaves, results, plays=False)
    playback = AttentionTape(leaves, results, plays=True)
    return recording, playback


def _detached(tensors: TapeEntries) -> TapeEntries:
    # Autograd marks a returned tensor as its output; the tape must not hold that graph alive.
    return tuple(tensor.detach() for tensor in tensors)
