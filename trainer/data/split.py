"""Which documents are held out and in which order the others are read: pure functions of names and
seed.

Orders come from a 64-bit mix and a stable sort, never from a library's generator, so that a run
resumed under another version of numpy or torch reads the same tokens.
"""

import hashlib

import numpy as np

SPLITS = ("train", "held_out")


def digest(text: str) -> int:
    """A 64-bit number that stands for a name."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def mix(numbers: np.ndarray) -> np.ndarray:
    """Scatter uint64 numbers over their whole range, one to one (the finaliser of SplitMix64,
    Steele et al. 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def is_held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """[documents] bool: True for about `fraction` of them, whatever the seed and whatever other
    documents there are."""
    return (
        mix(hashes) < np.uint64(int(fraction * 2.0**64))
        if fraction > 0
        else np.zeros(len(hashes), bool)
    )


def divide(hashes: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and of the held-out documents of finite data.

    Of two documents or more, neither side is left empty when fraction > 0: the document nearest to
    the border crosses. A single document is trained on.
    """
    out = is_held_out(hashes, fraction)
    if out.any() and out.all():
        out[np.argmax(mix(hashes))] = False
    elif fraction > 0 and len(hashes) > 1 and not out.any():
        out[np.argmin(mix(hashes))] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def arrange(hashes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of these documents in an epoch: a permutation, the same on every machine."""
    key = np.uint64(digest(f"order of seed {seed} in epoch {epoch}"))
    return np.argsort(mix(mix(hashes) ^ key), kind="stable")
