"""Facts: a small knowledge base about the standard library's functions, shown as facts, and a
question about it."""

import ast
from functools import lru_cache
from pathlib import Path

import numpy as np

from models.ranges import Few, Many
from trainer.data.errors import DataError
from trainer.data.sources.stdlib import Stdlib
from trainer.data.tasks.base import Example, SyntheticTask, bounds, whole

# tokens; entities have the numbers from 2 on
OPENING = 0
FOLLOWED_BY = 1
FACT = 3  # tokens: subject, FOLLOWED_BY, object
SHORTEST = (
    6  # functions that a module must define to be read: enough for a stretch of any of its names
)


class Facts(SyntheticTask):
    """Facts "subject FOLLOWED_BY object" in any order, then a subject again: what follows it is
    wanted.

    The entities are functions of the standard library, named as module.function, and the facts are
    true: they say in which order a module defines them. Each example reads the order forwards or
    backwards, so that of two neighbours either may be
    the one that follows: what the facts at hand say cannot be known by heart. Whatever is asked for
    is the object of one fact and the subject of another, so a fact that is found must be read in
    its direction.

    Args:
        min_facts, max_facts: stretches of neighbours that an example tells of, all from different
            places; each is `hops` + 1 facts.
        hops: facts between the subject that is asked for and the answer.
        entities: functions known, from the modules in order of their names.
        held_out, per_row: as in SyntheticTask.

    Source: the task of Miller et al. 2016 (arXiv:1606.03126) on a knowledge base, with facts from
    this machine; a run's data is that of the Python that reads it.
    """

    def __init__(
        self,
        *,
        min_facts: Many = 2,
        max_facts: Many = 6,
        hops: Few = 1,
        entities: Many = 256,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        self.sizes = bounds(min_facts, max_facts, names=("min_facts", "max_facts"))
        self.hops = whole("hops", hops, 1)
        self.modules = modules(whole("entities", entities, 1))
        names = [name for module in self.modules for name in module]
        self.words = ["?", "->", *names]
        self.vocabulary = len(self.words)
        self.longest = 1 + FACT * max_facts * (hops + 1) + FACT
        firsts = np.cumsum([0, *(len(module) for module in self.modules)]) + FOLLOWED_BY + 1
        self.starts = [
            int(first) + place
            for first, module in zip(firsts, self.modules)
            for place in range(len(module) - hops - 1)
        ]
        if len(self.starts) < max_facts * (hops + 2) ** 2:
            raise DataError(
                f"data.max_facts={max_facts} stretches of {hops + 2} functions, each in a place of"
                f" its own, need more than data.entities={entities}; give more entities, or fewer"
                " stretches or hops"
            )

    def example(self, random: np.random.Generator) -> Example:
        many = int(random.integers(*self.sizes, endpoint=True))
        size = self.hops + 2
        stretches: list[list[int]] = []
        while len(stretches) < many:
            start = self.starts[int(random.integers(len(self.starts)))]
            if all(abs(start - other[0]) >= size for other in stretches):
                stretches.append(list(range(start, start + size)))
        if random.integers(2):
            stretches = [stretch[::-1] for stretch in stretches]
        facts = [pair for stretch in stretches for pair in zip(stretch, stretch[1:])]
        told = [facts[i] for i in random.permutation(len(facts))]
        subject = stretches[0][1]
        answer = stretches[0][-1]
        tokens = [
            OPENING,
            *(token for a, b in told for token in (a, FOLLOWED_BY, b)),
            subject,
            FOLLOWED_BY,
            answer,
        ]
        given = np.ones(len(tokens), bool)
        given[-1] = False
        return Example(np.array(tokens, np.int64), given)


@lru_cache(maxsize=4)
def modules(entities: int) -> tuple[tuple[str, ...], ...]:
    """For each module, in order of their names, the names of the functions that it defines in its
    first level, in their order.

    Raises a DataError where the standard library has not so many of them in all.
    """
    found: list[tuple[str, ...]] = []
    left = entities
    for file in Stdlib().files():
        if "/" in file.name or left <= 0:
            continue
        names = functions(Path(file.path).read_text("utf-8", "replace"))
        if len(names) >= SHORTEST:
            found.append(tuple(f"{file.name.removesuffix('.py')}.{name}" for name in names[:left]))
            left -= len(found[-1])
    if left > 0:
        raise DataError(
            f"data.entities={entities}: this Python has {entities - left}; use"
            f" data.entities={entities - left}"
        )
    return tuple(found)


def functions(source: str) -> list[str]:
    """Names of the functions that a module defines in its first level, each once, in order; none
    where it is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return list(dict.fromkeys(node.name for node in tree.body if isinstance(node, ast.FunctionDef)))
