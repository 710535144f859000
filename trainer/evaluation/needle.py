"""Needle in a haystack: facts hidden in a long text, asked for at its end, by depth and length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from models.ranges import Range
from trainer.config.finding import Finding
from trainer.data.tokenizers import Tokenizer
from trainer.evaluation.base import Evaluation, EvaluationContext, Every, Figure, RunFacts
from trainer.evaluation.questions import Question, ask, cell_of, figures, length_of
from trainer.evaluation.words import REPEATED, WordKind, draw_distinct, held_out_tokens

NeedleKind = Literal["single", "multi_key", "multi_value", "multi_query"]
NeedleLength = Annotated[int, Range(8, 2**24)]
Depth = Annotated[float, Range(0.0, 1.0)]
Repeats = Annotated[int, Range(1, 64)]
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "\nWhat is the special magic {kind} for {keys} mentioned in the provided text? The special"
    " magic {kind} for {keys} mentioned in the provided text is"
)
SEVERAL = (
    "\nWhat are all the special magic {kind} for {keys} mentioned in the provided text? The special"
    " magic {kind} for {keys} mentioned in the provided text are"
)


@dataclass(frozen=True)
class Hidden:
    """The facts of one example.

    Attributes:
        sentences: the needles; the first stands at the depth that is asked about.
        ending: the question and the beginning of its answer.
        answers, distractors: as in a Question.
    """

    sentences: list[str]
    ending: str
    answers: list[str]
    distractors: list[str]


class Needle(Evaluation):
    """Hides one or several facts in filler and scores the answers against distractors.

    Args:
        lengths: tokens of a row, question and answer included; None = the context length.
        depths: places of the needle: 0 = at the very beginning, 1 = right before the question.
        variant: single: one fact. multi_key: facts of other keys beside it, whose values are
            distractors. multi_value: several values of one key, all wanted. multi_query: several
            keys, all asked for.
        needles: facts of a variant with several; the others stand at random depths.
        keys, values: what they are: numbers, words or uuids.
        filler: held_out: text of the held-out data; repeated: five sentences again and again.
        examples: of each depth and length.
        distractors: wrong answers that each answer is compared with; chance is 1 / (1 + this).
        generate: tokens to generate as well, in which the answers are looked for; 0 = none.
        every: as in Evaluation.

    Source: Kamradt 2023; the sentences and variants of RULER, Hsieh et al. 2024 (arXiv:2404.06654).
    Theirs greets the model with instructions, which small models do not follow, and only generates.
    """

    needs_text = True

    def __init__(
        self,
        *,
        lengths: list[NeedleLength] | None = None,
        depths: list[Depth] = [0.0, 0.25, 0.5, 0.75, 1.0],  # noqa: B006 - never written to
        variant: NeedleKind = "single",
        needles: Repeats = 4,
        keys: WordKind = "words",
        values: WordKind = "numbers",
        filler: Literal["held_out", "repeated"] = "held_out",
        examples: Repeats = 8,
        distractors: Repeats = 7,
        generate: Annotated[int, Range(0, 4096)] = 0,
        every: Every = None,
    ):
        super().__init__(every=every)
        if lengths == [] or depths == []:
            raise ValueError("lengths and depths must not be empty; name one at least")
        self.lengths = lengths
        self.depths = depths
        self.variant = variant
        self.needles = 1 if variant == "single" else needles
        self.keys: WordKind = keys
        self.values: WordKind = values
        self.filler = filler
        self.examples = examples
        self.distractors = distractors
        self.generate = generate

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        for length in self.lengths or [facts.config.context_length]:
            yield from facts.check_length("lengths", self.lengths, length + self.generate)
            hidden = self.hidden(np.random.default_rng(0))
            needed = self._tokens(facts.tokenizer, hidden)
            if needed > length:
                yield Finding(
                    facts.key("lengths"),
                    self.lengths or [length],
                    f"a row of {length} tokens has no room for needles, question and answer, which"
                    f" take {needed}",
                    f"use {needed} or more",
                )

    def run(self, context: EvaluationContext) -> list[Figure]:
        lengths = self.lengths or [context.config.context_length]
        pool = self._filler(context, 2 * max(lengths))
        cells = []
        for length in lengths:
            for depth_index, depth in enumerate(self.depths):
                questions = []
                for number in range(self.examples):
                    rng = np.random.default_rng([length, depth_index, number])
                    hidden = self.hidden(rng)
                    tokenizer = context.tokenizer
                    questions.append(self._question(tokenizer, hidden, length, depth, pool, rng))
                verdicts = ask(context, questions, f"needle at {length}", self.generate)
                cells.append(cell_of(verdicts, length=length, depth=depth))
        return figures(cells, self.distractors)

    def hidden(self, rng: np.random.Generator) -> Hidden:
        """Draws the facts of an example and the question about them."""
        key_count = 1
        if self.variant in ("multi_key", "multi_query"):
            key_count = self.needles
        values_per_key = self.needles if self.variant == "multi_value" else 1
        keys = draw_distinct(self.keys, key_count, rng)
        taken: set[str] = set()
        pairs: list[tuple[str, str]] = []
        for key in keys:
            for value in draw_distinct(self.values, values_per_key, rng, taken):
                pairs.append((key, value))
        asked = keys if self.variant == "multi_query" else keys[:1]
        answers = [value for key, value in pairs if key in asked]
        others = [value for key, value in pairs if key not in asked]
        fresh = draw_distinct(self.values, self.distractors, rng, taken)
        distractors = [*others, *fresh][: self.distractors]
        kind = self.values if len(answers) > 1 else self.values.removesuffix("s")
        template = SEVERAL if len(answers) > 1 else ONE
        return Hidden(
            [NEEDLE.format(kind=self.values, key=key, value=value) for key, value in pairs],
            template.format(kind=kind, keys=listed(asked)),
            [f" {answer}" for answer in answers],
            [f" {distractor}" for distractor in distractors],
        )

    def _filler(self, context: EvaluationContext, count: int) -> np.ndarray:
        if self.filler == "held_out":
            return held_out_tokens(context, count)
        return np.resize(np.asarray(context.tokenizer.encode(f"{REPEATED} "), np.int64), count)

    def _tokens(self, tokenizer: Tokenizer, hidden: Hidden) -> int:
        """Counts the tokens of a row without filler."""
        sentences = sum(length_of(tokenizer, f" {text} ") for text in hidden.sentences)
        candidates = (*hidden.answers, *hidden.distractors)
        longest = max(length_of(tokenizer, text) for text in candidates)
        return sentences + length_of(tokenizer, hidden.ending) + longest

    def _question(
        self,
        tokenizer: Tokenizer,
        hidden: Hidden,
        length: int,
        depth: float,
        pool: np.ndarray,
        rng: np.random.Generator,
    ) -> Question:
        """Lays the needles into filler so that the row has `length` tokens."""
        room = max(0, length - self._tokens(tokenizer, hidden))
        # The repeated sentences begin at a sentence; text is read from a place of its own.
        start = 0
        if self.filler == "held_out":
            start = int(rng.integers(0, len(pool) - room + 1))
        filler = pool[start : start + room]
        places = [round(depth * room)]
        for _ in hidden.sentences[1:]:
            places.append(int(rng.integers(0, room + 1)))
        tokens = insert(
            filler, places, [tokenizer.encode(f" {text} ") for text in hidden.sentences]
        )
        ending = np.asarray(tokenizer.encode(hidden.ending), np.int64)
        prompt_tokens = np.concatenate([tokens, ending])
        return Question(
            tokenizer.decode(prompt_tokens), prompt_tokens, hidden.answers, hidden.distractors
        )


def insert(filler: np.ndarray, places: Sequence[int], pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Inserts pieces before the tokens of `filler` at some places; the order of equals is kept."""
    order = sorted(range(len(pieces)), key=lambda index: places[index])
    parts: list[np.ndarray] = []
    before = 0
    for index in order:
        parts.append(filler[before : places[index]])
        parts.append(np.asarray(pieces[index], np.int64))
        before = places[index]
    parts.append(filler[before:])
    return np.concatenate(parts)


def listed(words: Sequence[str]) -> str:
    """Returns words as RULER lists them: a, b, and c."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])}, and {words[-1]}"
