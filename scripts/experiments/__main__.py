"""python -m scripts.experiments NAME [only=PART] [seeds=3] [first=0] [jobs=2] [steps=N]: small
models do what their kind promises.

Minutes on two cores. NAME is a recipe, such as recall; without one they are listed. Prints progress
on stderr and what was found, in markdown, on stdout. only: one part of the recipe. run: a run or an
export whose model is examined, in place of one that the recipe trains (quantized). pairs: a folder
of scripts.experiments.libreoffice_pairs (translation). first: the first seed. jobs: processes at
once, of one thread each. steps: other than the recipe's own, to try it out; what it then finds says
nothing. Exit status 1 when a lesson failed, 2 for a wish that cannot be honoured.
"""

import importlib
import sys
import time
from typing import Any

from scripts.experiments.runner import Budget, result_line
from trainer.entry import run_command
from trainer.errors import UserError

RECIPES = {  # name -> (module and function, its parts, what it shows)
    "recall": (
        "scripts.experiments.recall.recall",
        ("queries", "tracking", "decoding"),
        "associative recall and state tracking of every linear-time layer",
    ),
    "eviction": (
        "scripts.experiments.eviction.eviction",
        (),
        "which caches still answer when most of the text is gone",
    ),
    "quantized": (
        "scripts.experiments.quantized.quantized",
        (),
        "what fewer bits of cached keys and values cost",
    ),
    "experts": (
        "scripts.experiments.experts.experts",
        (),
        "what keeps experts evenly used, and Switch against a dense layer",
    ),
    "induction": (
        "scripts.experiments.induction.induction",
        (),
        "two layers of attention form induction heads, and one layer cannot",
    ),
    "sets": (
        "scripts.experiments.sets.sets",
        ("distinct", "points", "characters"),
        "Set Transformer against Deep Sets, on sets that were never seen",
    ),
    "graphs": (
        "scripts.experiments.graphs.graphs",
        ("trust", "karate"),
        "graph attention against the mean of neighbours, on unseen graphs and nodes",
    ),
    "alignment": (
        "scripts.experiments.alignment.alignment",
        ("image", "sound", "terms", "layers"),
        "refusals that text teaches, asked for in images and sounds; probes of their direction",
    ),
    "seq2seq": (
        "scripts.experiments.seq2seq.seq2seq",
        (),
        "reversing beyond the trained length: no attention, Bahdanau, Luong, the Transformer",
    ),
    "translation": (
        "scripts.experiments.translation.translation",
        (),
        "BLEU of English to German: no attention, Bahdanau, Luong, the Transformer",
    ),
    "memory": (
        "scripts.experiments.memory.memory",
        ("text", "retrieval", "copying", "facts"),
        "Transformer-XL, retrieval beyond the window, Turing machine, key-value net",
    ),
}

# Settings of single recipes: name -> the recipes that take it.
OF_SOME = {"run": ("quantized",), "pairs": ("translation",)}


def effort(words: list[str], parts: tuple[str, ...] = (), *, recipe: str = "") -> Budget:
    """Reads the words of the command line.

    Args:
        parts: of the recipe.
        recipe: its name, by which it may take a trained model (run=) or texts (pairs=).

    Raises:
        ValueError: a word is unknown or has a wrong value.
    """
    asked: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in Budget._fields or recipe not in OF_SOME.get(key, (recipe,)):
            raise ValueError(
                f"{word}: there is no such setting; known:"
                f" {', '.join(f'{field}=' for field in Budget._fields)}"
            )
        if key == "only":
            if value not in parts:
                raise ValueError(
                    f"{word}: there is no such part; known:"
                    f" {', '.join(parts) or 'none, leave only= out'}"
                )
            asked[key] = value
            continue
        if key in OF_SOME:
            asked[key] = value
            continue
        least = 0 if key == "first" else 1
        if not value.isdecimal() or int(value) < least:
            raise ValueError(
                f"{word}: a whole number of {least} or more is needed, for example {key}=2"
            )
        asked[key] = int(value)
    return Budget(**asked)


def listed() -> str:
    return "\n".join(f"    {name:12}{words}" for name, (_, _, words) in RECIPES.items())


def main(words: list[str]) -> int:
    name, *settings = words or [""]
    if name not in RECIPES:
        print(
            f"{name or 'no recipe'}: there is no such recipe; known:\n{listed()}", file=sys.stderr
        )
        return 2
    try:
        wish = effort(settings, RECIPES[name][1], recipe=name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    home, _, function = RECIPES[name][0].rpartition(".")
    began = time.perf_counter()
    try:
        text, learned = getattr(importlib.import_module(home), function)(
            wish, lambda line: print(line, file=sys.stderr, flush=True)
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except ModuleNotFoundError as error:
        print(
            f"{name}: the package {error.name} is not installed; pip install longspan[dev]",
            file=sys.stderr,
        )
        return 2
    failed = [each for each in learned if each.fault is not None]
    print(
        f"{text}\n\n{len(learned)} lessons, seeds={wish.seeds} jobs={wish.jobs},"
        f" {time.perf_counter() - began:.0f} s"
    )
    for each in failed:
        print(result_line(each), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main, __doc__)
