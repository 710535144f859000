"""The Neural Turing Machine: a small network that writes to and reads from a memory by where and by
what.

Letters: B rows, H heads of a kind, N slots of the memory, M their width, R = 2 reach + 1 shifts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.architectures.token_by_token import LstmGates, StateTuple, TokenByTokenModel, scaled
from models.memory.base import Memory
from models.ranges import Count, Few, Many

EMPTY = 1e-6  # in every slot of a memory that nothing was written to
TINY = 1e-16  # keeps logarithms of zero finite
SHORT = 1e-8  # length of a vector below which it is like none
DECIDED = (
    2.0  # what heads begin with where they begin decided, before a sigmoid, a softplus or a softmax
)
CONTROLLERS = ("feedforward", "lstm")


class NeuralTuringMachine(TokenByTokenModel):
    """A controller with heads that read from a memory and heads that write to it; see Stepped for
    what comes in and goes out.

    Args:
        vocabulary: token numbers are below it.
        width: of the controller.
        heads: that read, and as many that write.
        memory: as in Stepped.
        slots, slot_width: of the memory.
        reach: slots that a head may shift by in one step, to either side.
        controller: feedforward, or lstm. The first must keep in memory whatever it keeps, and
            copies far beyond the lengths it was trained on; the second may count by itself.

    At each token all heads look where to go in the memory as the token before left it; then it is
    read, then written. The memory starts from a constant (Collier & Beel 2018, arXiv:1807.08518),
    every head at the first slot and, unlike theirs,
    inclined to go forward: with undecided heads two of three seeds had not learned to copy after
    200 steps of 32.
    Source: Graves et al. 2014 (arXiv:1410.5401).
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        heads: int,
        memory: Memory | None = None,
        *,
        slots: Many = 128,
        slot_width: Count = 20,
        reach: Few = 1,
        controller: str = "feedforward",
    ):
        super().__init__(vocabulary, memory)
        if controller not in CONTROLLERS:
            raise ValueError(
                f"unknown controller={controller}; choose one of {', '.join(CONTROLLERS)}"
            )
        if reach < 1 or slots < 2 * reach + 1 or slot_width < 1:
            raise ValueError(
                f"slots={slots}, slot_width={slot_width}, reach={reach}: heads shift by 1 slot or"
                f" more to either side, so use reach=1 or more, slots={2 * max(reach, 1) + 1} or"
                " more and slot_width=1 or more"
            )
        self.multiply_adds = (
            4 * heads * slots * slot_width
        )  # multiply-adds a token: two looks, a read and a write for each head
        self.width = width
        self.heads = heads
        self.slots = slots
        self.slot_width = slot_width
        self.shifts = 2 * reach + 1
        inputs = self.bits + heads * slot_width
        self.gates = LstmGates(inputs, width) if controller == "lstm" else None
        self.hidden = nn.Linear(inputs, width) if controller == "feedforward" else None
        self.aim = nn.Linear(width, 2 * heads * (slot_width + 3 + self.shifts))
        self.write = nn.Linear(width, 2 * heads * slot_width)
        self.out = nn.Linear(width + heads * slot_width, self.bits)

    def init_rules(self) -> dict:
        """Heads start by going forward, a slot a token, whatever they see: looking for content at
        first loses every place."""

        def forward(shape: torch.Size, generator: torch.Generator) -> Tensor:
            gate = -DECIDED
            strength = 0.0
            sharp = DECIDED
            shift = [0.0] * (self.shifts // 2 + 1) + [DECIDED] + [0.0] * (self.shifts // 2 - 1)
            return torch.tensor(
                [*[0.0] * self.slot_width, gate, strength, sharp, *shift] * (2 * self.heads)
            )

        return {
            "aim.bias": forward,
            **{name: scaled for name, p in self.named_parameters() if p.dim() > 1},
        }

    def blank(self, rows: int, like: Tensor) -> StateTuple:
        """(memory [B, N, M], where all heads are [B, 2H, N], what was read [B, H M], and of an LSTM
        two [B, width])."""
        places = like.new_zeros(rows, 2 * self.heads, self.slots)
        places[..., 0] = 1
        memory = like.new_full((rows, self.slots, self.slot_width), EMPTY)
        controlled = 0 if self.gates is None else 2
        return (
            memory,
            places,
            *(
                like.new_zeros(rows, n)
                for n in (self.heads * self.slot_width, *[self.width] * controlled)
            ),
        )

    def token(self, x: Tensor, state: StateTuple) -> tuple[Tensor, StateTuple]:
        memory, places, read, *held = state
        wide = memory.dtype
        heads = self.heads
        x = torch.cat([x.to(wide), read], -1)
        if self.gates is not None:
            held = self.gates(x, *held)
            said = held[0]
        else:
            assert self.hidden is not None
            said = torch.tanh(self.hidden(x.to(self.hidden.weight.dtype)).to(wide))
        narrow = said.to(self.aim.weight.dtype)
        aim = self.aim(narrow).to(wide).unflatten(-1, (2 * heads, -1))
        key, gate, positive, shift = aim.split([self.slot_width, 1, 2, self.shifts], -1)
        strength, sharp = F.softplus(positive).split(1, -1)
        places = address(
            key.tanh(), strength, gate.sigmoid(), shift.softmax(-1), 1 + sharp, places, memory
        )
        read = (places[:, :heads] @ memory).flatten(1)
        erase, add = self.write(narrow).to(wide).unflatten(-1, (2, heads, -1)).unbind(1)
        memory = written(memory, places[:, heads:], erase.sigmoid(), add)
        out = self.out(torch.cat([said, read], -1).to(self.out.weight.dtype)).to(wide)
        return out, (memory, places, read, *held)


def address(
    key: Tensor,
    strength: Tensor,
    gate: Tensor,
    shift: Tensor,
    sharp: Tensor,
    before: Tensor,
    memory: Tensor,
) -> Tensor:
    """[B, H, N]: where heads go, weights that sum to 1.

    By content, mixed by the gate with where they were, shifted in a circle, sharpened: equations 5
    to 9 of the paper.

    Args:
        key: [B, H, M] that the content of slots is compared with, by the cosine.
        strength, gate, sharp: [B, H, 1], the paper's beta > 0, g in (0, 1), gamma >= 1.
        shift: [B, H, R] weights of the shifts -reach to reach.
        before: [B, H, N] where they were. memory: [B, N, M].
    """
    alike = (key @ memory.mT) * _inverse_length(key)[..., None] * _inverse_length(memory)[:, None]
    content = (strength * alike).softmax(-1)
    mixed = gate * content + (1 - gate) * before
    reach = shift.shape[-1] // 2
    around = torch.cat([mixed[..., -reach:], mixed, mixed[..., :reach]], -1).unfold(
        -1, shift.shape[-1], 1
    )
    moved = (around @ shift.flip(-1)[..., None])[..., 0]
    return (sharp * (moved + TINY).log()).softmax(-1)  # moved ** sharp, over its sum


def written(memory: Tensor, places: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """[B, N, M]: the memory after heads at `places` [B, H, N] erased [B, H, M] of it, all of them,
    and then added [B, H, M]."""
    for where, what in zip(places.unbind(1), erase.unbind(1)):
        memory = memory - memory * (where[..., None] * what[:, None])
    return memory + places.mT @ add


def _inverse_length(x: Tensor) -> Tensor:
    """[...]: 1 / the Euclidean length of vectors [..., M]."""
    return ((x * x).sum(-1) + SHORT**2).rsqrt()
