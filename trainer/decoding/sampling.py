"""Choosing the next token: small functions of logits, without state and without a random generator.

They are applied in this order: repetition penalty, temperature, top-k, top-p, min-p, as in
transformers. The random number is a function of names (seed, prompt, index of the token), so a text
is the same on any ranks and in any batch.

Letters: V vocabulary.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The rule by which the next token is chosen.

    Args:
        temperature: divides the logits; 0: the likeliest token, and nothing below counts.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together reach this probability (nucleus, Holtzman et
            al. 2019, arXiv:1904.09751); 1: all.
        min_p: only tokens at least so many times as likely as the likeliest (Nguyen et al. 2024,
            arXiv:2407.01082); 0: all.
        repetition_penalty: makes tokens that occurred, in the prompt too, less likely: their
            logits are divided by it where positive, else multiplied (Keskar et al. 2019,
            arXiv:1909.05858); 1: none.

    Raises:
        ValueError: a setting out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature}: divides logits, so it is 0 (the likeliest token)"
                " or more; use 1"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: a number of tokens; use 1 or more, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: a probability above 0; use 1 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: a share from 0 to 1; use 0 for all tokens")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty}: divides logits, so it is above 0;"
                " use 1 for none"
            )


GREEDY = Sampling(temperature=0.0)


def choose(logits: Tensor, sampling: Sampling, seen: Collection[int], number: float) -> int:
    """Returns a token.

    Args:
        logits: [V].
        seen: tokens so far, those of the prompt among them.
        number: uniform in [0, 1); the same number gives the same token.
    """
    logits = logits.to(torch.float64)
    logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    logits = top_k(logits, sampling.top_k)
    logits = top_p(logits, sampling.top_p)
    logits = min_p(logits, sampling.min_p)
    return inverse_cdf(logits.softmax(-1), number)


def penalised(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """Makes the tokens that were seen less likely."""
    if penalty == 1 or not seen:
        return logits
    index = torch.tensor(sorted(set(seen)), device=logits.device)
    values = logits[index]
    values = torch.where(values > 0, values / penalty, values * penalty)
    return logits.index_copy(0, index, values)


def top_k(logits: Tensor, count: int) -> Tensor:
    """Leaves the `count` largest logits; all that equal the last of them stay too."""
    if not 0 < count < len(logits):
        return logits
    last = logits.topk(count).values[-1]
    return logits.masked_fill(logits < last, -torch.inf)


def top_p(logits: Tensor, share: float) -> Tensor:
    """Leaves the fewest likeliest tokens whose probabilities add up to `share` or more."""
    if share == 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    unlikely = torch.zeros_like(logits, dtype=torch.bool)
    unlikely[order] = before >= share
    return logits.masked_fill(unlikely, -torch.inf)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Leaves the tokens that are at least `share` times as likely as the likeliest."""
    if share == 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < share * probabilities.max(), -torch.inf)


def inverse_cdf(probabilities: Tensor, number: float) -> int:
    """Returns the first token at which the running sum of probabilities exceeds `number`."""
    running = probabilities.cumsum(-1)
    token = int(torch.searchsorted(running, number * running[-1], right=True))
    # Rounding may leave the number at the very end, behind tokens of probability 0.
    last = int(probabilities.nonzero()[-1])
    return min(token, last)


def uniform(*names: object) -> float:
    """Returns a number in [0, 1) that is a function of the names alone."""
    name = "/".join(str(name) for name in names)
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    # 53 bits are what a double holds: more would round up to 1.
    return (int.from_bytes(digest, "little") >> 11) / 2**53
