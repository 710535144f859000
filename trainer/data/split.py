"""Choice of held-out documents and of the reading order: pure functions of names and seed.

Orders come from a 64-bit mix and a stable sort, never from a library's generator, so that a run
resumed under another version of numpy or torch reads the same tokens.
"""

import hashlib

import numpy as np

SPLITS = ("train", "held_out")


def digest(text: str) -> int:
    """Hashes a name to a 64-bit number."""
    # surrogatepass: file names on Linux may hold bytes that are not UTF-8.
    name = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def mix(numbers: np.ndarray) -> np.ndarray:
    """Scatters uint64 numbers over their range, one to one (SplitMix64, Steele et al. 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def is_held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Selects about `fraction` of the documents, by their own hash alone.

    A document therefore stays held out under another seed and among other documents.

    Args:
        hashes: [documents] uint64.
        fraction: from 0 up to, not with, 1.

    Returns:
        [documents] bool.
    """
    if fraction <= 0:
        return np.zeros(len(hashes), bool)
    return mix(hashes) < np.uint64(int(fraction * 2.0**64))


def divide(hashes: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the training and of the held-out documents of finite data.

    Of two documents or more, neither side is left empty when fraction > 0: the document nearest to
    the threshold crosses. A single document is trained on.
    """
    held_out = is_held_out(hashes, fraction)
    if held_out.any() and held_out.all():
        held_out[np.argmax(mix(hashes))] = False
    elif fraction > 0 and len(hashes) > 1 and not held_out.any():
        held_out[np.argmin(mix(hashes))] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def arrange(hashes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the documents in an epoch: a permutation, equal on every machine."""
    key = np.uint64(digest(f"order of seed {seed} in epoch {epoch}"))
    # Mixed before the key too: hashes that differ in few bits would stay neighbours.
    return np.argsort(mix(mix(hashes) ^ key), kind="stable")
