"""The policies of `overflow=` at the context limit, a small class each.

A policy decides twice: which tokens of a prompt that is too long are read, and which tokens of a
text that has reached the limit go. It knows numbers of tokens alone; models/cache/shifting.py
changes a state.

                    prompt too long                  text at the limit
    raise           error                            error
    stop            error                            ends
    truncate_start  its last tokens                  ends
    truncate_middle its first n_keep and last        ends
    shift           its first n_keep and last        drops half, turns the keys of the others
    recompute       its first n_keep and last        drops half, reads the others again

`shift` is approximate: the values that stay were computed with the tokens that went. `recompute`
drops the same tokens and is exact: its state is that of a fresh text of the others.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from models.ranges import Some


class ContextFull(ValueError):
    """A prompt or a text is longer than the context, and the policy says that this is an error."""


class Cut(NamedTuple):
    """Tokens that go: from `start` to `stop`, counted from the beginning of the text.

    Attributes:
        recompute: the others are read again; else cached keys are turned to their new places.
    """

    start: int
    stop: int
    recompute: bool

    def of(self, tokens: Sequence[int]) -> list[int]:
        """Returns the tokens that stay."""
        return [*tokens[: self.start], *tokens[self.stop :]]


class Overflow(ABC):
    """A policy at the context limit.

    Attributes:
        name: as in `overflow=NAME`.
    """

    name: ClassVar[str]

    @abstractmethod
    def prompt(self, tokens: Sequence[int], limit: int, answer: int) -> list[int]:
        """Returns the tokens of a prompt that are read.

        Args:
            limit: tokens of the context.
            answer: tokens that are to be generated.

        Raises:
            ContextFull: the prompt is too long and may not be cut.
        """

    @abstractmethod
    def full(self, limit: int) -> Cut | None:
        """Returns what goes from a text of `limit` tokens; None: the text ends.

        Raises:
            ContextFull: it may not end here.
        """


class Raise(Overflow):
    """`overflow=raise`: a text that does not fit is an error."""

    name = "raise"

    def prompt(self, tokens: Sequence[int], limit: int, answer: int) -> list[int]:
        """See Overflow."""
        return whole_prompt(tokens, limit, self.name)

    def full(self, limit: int) -> Cut | None:
        """See Overflow."""
        raise ContextFull(
            f"overflow=raise: the text has reached the limit of {limit} tokens; use overflow=stop,"
            " overflow=shift or overflow=recompute, or generate fewer tokens"
        )


class Stop(Overflow):
    """`overflow=stop`: a text ends at the limit."""

    name = "stop"

    def prompt(self, tokens: Sequence[int], limit: int, answer: int) -> list[int]:
        """See Overflow."""
        return whole_prompt(tokens, limit, self.name)

    def full(self, limit: int) -> Cut | None:
        """See Overflow."""
        return None


class TruncateStart(Overflow):
    """`overflow=truncate_start`: of a long prompt the last tokens are read; texts end at the limit.

    A prompt leaves room for its answer, but never gives up more than half of the context for it.
    """

    name = "truncate_start"

    def prompt(self, tokens: Sequence[int], limit: int, answer: int) -> list[int]:
        """See Overflow."""
        room = prompt_room(limit, answer)
        return list(tokens[max(0, len(tokens) - room) :])

    def full(self, limit: int) -> Cut | None:
        """See Overflow."""
        return None


class Keeping(Overflow):
    """The common part of policies that keep the first tokens.

    Args:
        n_keep: first tokens that stay.
    """

    def __init__(self, n_keep: Some = 4):
        if n_keep < 0:
            raise ValueError(f"overflow.n_keep={n_keep} is a number of tokens; use 0 or more")
        self.n_keep = n_keep

    def prompt(self, tokens: Sequence[int], limit: int, answer: int) -> list[int]:
        """See Overflow."""
        self.check(limit)
        room = prompt_room(limit, answer)
        if len(tokens) <= room:
            return list(tokens)
        first = min(self.n_keep, room - 1)
        return [*tokens[:first], *tokens[len(tokens) - (room - first) :]]

    def check(self, limit: int) -> None:
        """Checks that something is left to go once the first tokens stay.

        Raises:
            ValueError: the first tokens fill the context.
        """
        if self.n_keep + 2 > limit:
            raise ValueError(
                f"overflow.n_keep={self.n_keep} leaves no token to drop of a context of {limit};"
                f" use {max(0, limit - 2)} or less"
            )

    def half(self, limit: int, *, recompute: bool) -> Cut:
        """Half of what is not kept, oldest first."""
        self.check(limit)
        return Cut(self.n_keep, self.n_keep + (limit - self.n_keep) // 2, recompute)


class TruncateMiddle(Keeping):
    """`overflow=truncate_middle`: of a long prompt the first `n_keep` and the last tokens are read.

    Texts end at the limit.
    """

    name = "truncate_middle"

    def full(self, limit: int) -> Cut | None:
        """See Overflow."""
        return None


class Shift(Keeping):
    """`overflow=shift`: the first `n_keep` tokens stay, the older half of the others goes.

    Cached keys of what stays are turned to their new places. The "context shift" of llama.cpp.
    """

    name = "shift"

    def full(self, limit: int) -> Cut | None:
        """See Overflow."""
        return self.half(limit, recompute=False)


class Recompute(Keeping):
    """`overflow=recompute`: drops what `shift` drops and reads the rest again, which is exact."""

    name = "recompute"

    def full(self, limit: int) -> Cut | None:
        """See Overflow."""
        return self.half(limit, recompute=True)


POLICIES: dict[str, type[Overflow]] = {
    policy.name: policy for policy in (Raise, Stop, TruncateStart, TruncateMiddle, Shift, Recompute)
}


def policy_of(name: str, n_keep: int | None = None) -> Overflow:
    """Returns the policy of `overflow=NAME`.

    Args:
        n_keep: first tokens that stay; None: the policy's own number.

    Raises:
        ValueError: there is no policy of this name, or it keeps no first tokens.
    """
    if name not in POLICIES:
        raise ValueError(f"overflow={name} is unknown; use {', '.join(POLICIES)}")
    policy = POLICIES[name]
    if n_keep is None:
        return policy()
    if not issubclass(policy, Keeping):
        raise ValueError(
            f"n_keep={n_keep}: overflow={name} keeps no first tokens; leave it out, or use"
            " overflow=truncate_middle, overflow=shift or overflow=recompute"
        )
    return policy(n_keep)


def prompt_room(limit: int, answer: int) -> int:
    """Returns the tokens of a context that a prompt may take: what the answer leaves, or half."""
    return max(1, limit - min(answer, limit // 2))


def whole_prompt(tokens: Sequence[int], limit: int, name: str) -> list[int]:
    """Returns the tokens if they and one more fit.

    Raises:
        ContextFull: they leave no room for an answer.
    """
    if len(tokens) >= limit:
        raise ContextFull(
            f"overflow={name}: the prompt has {len(tokens)} tokens, and a context of {limit} has no"
            " room for more; use overflow=truncate_start or overflow=truncate_middle, or a shorter"
            " prompt"
        )
    return list(tokens)
