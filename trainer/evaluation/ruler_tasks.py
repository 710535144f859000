"""Generators of RULER's thirteen tasks: a prompt of a given length, its answers, and distractors.

Templates, needles, chains and word counts are those of RULER, Hsieh et al. 2024 (arXiv:2404.06654),
as lm-eval 0.4.13 has them, so that models that follow instructions can be compared. We differ: a
haystack is fitted to the length by bisection and not in steps of 5 to 500 units; the text of
`essay` is the run's held-out text, its sentences end at . ! or ?; words come from our own list;
every example has a random generator of its own; and each answer has distractors.
"""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.data.tokenizers import Tokenizer
from trainer.evaluation.needle import NEEDLE, listed
from trainer.evaluation.questions import length_of
from trainer.evaluation.ruler_questions import QuestionAnswer
from trainer.evaluation.words import REPEATED, WordKind, draw, draw_distinct, plain_words

NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I"
    " will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind}"
    " for {query} mentioned in the provided text?"
)
NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text {verb}"
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
)
# The misspelt word is RULER's, and part of what models are compared on.
TRACKING_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables"
    " are assgined the value {query}, they are:"
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common"
    " words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most"
    " frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please"
    " ignore the dots '....'. What are the three most frequently appeared words in the above coded"
    " text?"
)
FREQUENT_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
READING = (
    "Answer the question based on the given documents. Only give me the answer and do not output"
    " any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question"
    " based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
READING_PREFIX = " Answer:"
DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int)
HOPS = 4
SHORT = 4096  # tokens below which words of the list of common words are repeated less often
ZETA_2 = math.pi**2 / 6  # the sum of 1 / k^2
LETTERS = 6  # of a coded word
EXAMPLE_SHARE = 4  # an example of variable tracking takes at most this part of a row


class RulerExample(NamedTuple):
    """One example: the text before the answer, the answers, and wrong ones."""

    prompt: str
    answers: list[str]
    distractors: list[str]


@dataclass(frozen=True)
class Haystack:
    """The text in which a needle task hides its needles, and the needles.

    Attributes:
        kind: repeat: five sentences again and again; essay: text; needle: other needles.
        keys, values: kinds of both.
        key_count, value_count, query_count: keys hidden, values of each, keys asked for.
    """

    kind: str
    keys: WordKind = "words"
    values: WordKind = "numbers"
    key_count: int = 1
    value_count: int = 1
    query_count: int = 1


NEEDLE_TASKS = {
    "niah_single_1": Haystack("repeat"),
    "niah_single_2": Haystack("essay"),
    "niah_single_3": Haystack("essay", values="uuids"),
    "niah_multikey_1": Haystack("essay", key_count=4),
    "niah_multikey_2": Haystack("needle"),
    "niah_multikey_3": Haystack("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Haystack("essay", value_count=4),
    "niah_multiquery": Haystack("essay", key_count=4, query_count=4),
}
QUESTION_TASKS = ("qa_squad", "qa_hotpot")
TASKS = (*NEEDLE_TASKS, "vt", "cwe", "fwe", *QUESTION_TASKS)
# Tokens that an answer may have, which the prompt leaves free.
ANSWER_TOKENS = dict.fromkeys(NEEDLE_TASKS, 128)
ANSWER_TOKENS |= {"vt": 30, "cwe": 120, "fwe": 50, "qa_squad": 32, "qa_hotpot": 32}


class RulerWriter:
    """Writes examples of the tasks for one tokenizer.

    Args:
        tokenizer: by which lengths are counted.
        essay: text for haystacks; repeated where it is too short.
        questions: those of the question tasks, by task.
        distractors: wrong answers of each example.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        essay: str,
        questions: Mapping[str, Sequence[QuestionAnswer]],
        distractors: int,
    ):
        self.tokenizer = tokenizer
        self.essay = essay.split() or REPEATED.split()
        self.questions = questions
        self.distractors = distractors

    def write(self, task: str, length: int, number: int) -> RulerExample:
        """Writes example `number` of a task for rows of `length` tokens.

        Raises:
            ValueError: a row has no room for even the shortest example.
        """
        seed = [TASKS.index(task), length, number]

        def build(units: int) -> RulerExample | None:
            # The same choices for every size that is tried, so that lengths are comparable.
            rng = np.random.default_rng(seed)
            if task in NEEDLE_TASKS:
                return self._needles(NEEDLE_TASKS[task], units, rng)
            if task == "vt":
                return self._tracking(units, length, rng)
            if task == "cwe":
                return self._common(units, length, rng)
            if task == "fwe":
                return self._frequent(units, length, rng)
            return self._reading(task, units, number, rng)

        return self._fitted(task, build, length - ANSWER_TOKENS[task])

    def _fitted(
        self, task: str, build: Callable[[int], RulerExample | None], room: int
    ) -> RulerExample:
        """Returns the example of the most units whose prompt has at most `room` tokens.

        Args:
            task: for the message.
            build: units -> example; None where so few units do not make one, or there are no more.
            room: tokens.
        """

        def fits(units: int) -> bool:
            example = build(units)
            return example is not None and length_of(self.tokenizer, example.prompt) <= room

        smallest = next((units for units in range(1, 257) if build(units) is not None), 1)
        if not fits(smallest):
            raise ValueError(
                f"a row of {room + ANSWER_TOKENS[task]} tokens has no room for {task} and"
                f" {ANSWER_TOKENS[task]} tokens of an answer"
            )
        low = smallest
        high = 2 * low
        while fits(high):
            low = high
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            if fits(middle):
                low = middle
            else:
                high = middle
        example = build(low)
        assert example is not None, "it fitted"
        return example

    def _needles(
        self, haystack: Haystack, units: int, rng: np.random.Generator
    ) -> RulerExample | None:
        taken: set[str] = set()
        keys = draw_distinct(haystack.keys, haystack.key_count, rng)
        values = [draw_distinct(haystack.values, haystack.value_count, rng, taken) for _ in keys]
        needles = []
        for key, own in zip(keys, values):
            for value in own:
                needles.append(NEEDLE.format(kind=haystack.values, key=key, value=value))
        rng.shuffle(needles)
        fresh = draw_distinct(haystack.values, self.distractors, rng, taken)
        asked = rng.permutation(len(keys))[: haystack.query_count].tolist()
        context = self._context(haystack, units, needles, rng)
        if context is None:
            return None
        queries = [keys[index] for index in asked]
        answers = [value for index in asked for value in values[index]]
        others = [value for index, own in enumerate(values) if index not in asked for value in own]
        query = listed(queries)
        text = NIAH
        kind = haystack.values
        verb = "are"
        if len(answers) == 1:
            text = text.replace("Some", "A").replace("are all", "is").replace("are", "is")
            kind = haystack.values.removesuffix("s")
            verb = "is"
        prompt = text.format(kind=kind, context=context, query=query)
        prompt += NIAH_PREFIX.format(kind=kind, query=query, verb=verb)
        return self._example(prompt, answers, [*others, *fresh])

    def _context(
        self, haystack: Haystack, units: int, needles: list[str], rng: np.random.Generator
    ) -> str | None:
        """Hides needles among so many units: words of an essay, or sentences."""
        if haystack.kind == "essay":
            words = self.essay * (units // len(self.essay) + 1)
            sentences = re.split(r"(?<=[.!?])\s+", " ".join(words[:units]))
            depths = rng.choice(DEPTHS, len(needles), replace=False)
            places = sorted(int(len(sentences) * depth / 100) for depth in depths)
            joint = " "
        else:
            sentences = [REPEATED] * units
            if haystack.kind == "needle":
                sentences = [self._other_needle(haystack, rng) for _ in range(units)]
            if units < len(needles):
                return None
            places = sorted(rng.choice(units, len(needles), replace=False).tolist())
            joint = "\n"
        for offset, (place, needle) in enumerate(zip(places, needles)):
            sentences.insert(place + offset, needle)
        return joint.join(sentences)

    def _other_needle(self, haystack: Haystack, rng: np.random.Generator) -> str:
        key = draw(haystack.keys, rng)
        value = draw(haystack.values, rng)
        return NEEDLE.format(kind=haystack.values, key=key, value=value)

    def _tracking(self, units: int, length: int, rng: np.random.Generator) -> RulerExample | None:
        """One chain of variables among sentences, after an example with its answer."""
        prompt, names = chain_prompt(units, 5, rng)
        example, example_names = chain_prompt(5, 3, rng)
        example = f"{example} {' '.join(example_names)}\n\n"
        if EXAMPLE_SHARE * length_of(self.tokenizer, example) <= length:
            prompt = f"{example}\n\n{prompt}"
        wrong = [variable(5, rng) for _ in range(2 * self.distractors)]
        return self._example(prompt, names, [name for name in wrong if name not in prompt])

    def _common(self, units: int, length: int, rng: np.random.Generator) -> RulerExample | None:
        """Ten words that are repeated more often than `units` - 10 others."""
        if units <= 10:
            return None
        often = 6 if length < SHORT else 30
        seldom = 1 if length < SHORT else 3
        words = plain_words(units + self.distractors, rng)
        common = words[:10]
        uncommon = words[10:units]
        row = [*(common * often), *(uncommon * seldom)]
        rng.shuffle(row)
        context = " ".join(f"{index + 1}. {word}" for index, word in enumerate(row))
        prompt = COMMON.format(context=context) + COMMON_PREFIX
        return self._example(prompt, common, words[10:])

    def _frequent(self, units: int, length: int, rng: np.random.Generator) -> RulerExample | None:
        """Coded words whose counts fall as 1 / k^2; the most frequent is noise."""
        size = max(length // 50, 8)
        counts = [int(units / k**2 / ZETA_2) for k in range(1, size + 1)]
        # The third must be told from the fourth.
        if counts[3] <= counts[4]:
            return None
        words = sorted({coded_word(rng) for _ in range(size)})
        while len(words) < size:
            words = sorted({*words, coded_word(rng)})
        rng.shuffle(words)
        words[0] = "..."
        row = [word for word, count in zip(words, counts) for _ in range(count)]
        rng.shuffle(row)
        prompt = FREQUENT.format(context=" ".join(row)) + FREQUENT_PREFIX
        return self._example(prompt, words[1:4], words[4:])

    def _reading(
        self, task: str, units: int, number: int, rng: np.random.Generator
    ) -> RulerExample | None:
        """A question about one of `units` paragraphs."""
        questions = self.questions[task]
        question = questions[number % len(questions)]
        if units < len(question.paragraphs):
            return None
        shown = list(question.paragraphs)
        pool = dict.fromkeys(paragraph for other in questions for paragraph in other.paragraphs)
        others = [paragraph for paragraph in pool if paragraph not in shown]
        if units > len(shown) + len(others):
            return None
        order = rng.permutation(len(others))[: units - len(shown)]
        shown += [others[index] for index in order]
        rng.shuffle(shown)
        context = "\n\n".join(f"Document {i + 1}:\n{text}" for i, text in enumerate(shown))
        prompt = READING.format(context=context, query=question.question) + READING_PREFIX
        wrong = dict.fromkeys(answer for other in questions for answer in other.answers[:1])
        distractors = [answer for answer in wrong if answer not in question.answers]
        if len(distractors) < self.distractors:
            distractors += plain_words(self.distractors, rng)
        return self._example(prompt, question.answers[:1], distractors)

    def _example(
        self, prompt: str, answers: Sequence[str], distractors: Sequence[str]
    ) -> RulerExample:
        return RulerExample(
            prompt,
            [f" {answer}" for answer in answers],
            [f" {distractor}" for distractor in distractors[: self.distractors]],
        )


def chain_prompt(units: int, letters: int, rng: np.random.Generator) -> tuple[str, list[str]]:
    """Returns the prompt about one chain of assignments among `units` sentences, and its names."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = variable(letters, rng)
        if name not in names:
            names.append(name)
    value = str(rng.integers(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    for before, name in zip(names, names[1:]):
        chain.append(f"VAR {name} = VAR {before} ")
    sentences = [f"{REPEATED}\n"] * units
    if len(sentences) <= len(chain):
        # Too few to hold the chain between them: their own sentences are used.
        sentences = [f"{part}." for part in (f"{REPEATED}\n" * units).split(".") if part.strip()]
    places = sorted(rng.choice(len(sentences), min(len(chain), len(sentences)), replace=False))
    for offset, (place, link) in enumerate(zip(places, chain)):
        sentences.insert(int(place) + offset, link)
    context = " ".join(sentences).replace(". \n", ".\n")
    prompt = TRACKING.format(context=context, query=value)
    return prompt + TRACKING_PREFIX.format(count=HOPS + 1, query=value), names


def variable(letters: int, rng: np.random.Generator) -> str:
    """Draws the name of a variable in capitals."""
    return "".join(rng.choice(list(string.ascii_uppercase), letters))


def coded_word(rng: np.random.Generator) -> str:
    """Draws a word of random letters."""
    return "".join(rng.choice(list(string.ascii_lowercase), LETTERS))
