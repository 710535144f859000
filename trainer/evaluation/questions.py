"""Questions about a context: an answer is right where the model rates it above every distractor.

This needs no generation, so it also tells small models and models of bytes apart, and costs one
forward pass for each candidate.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.config.build_model import build_cache
from trainer.data.tokenizers import Tokenizer
from trainer.evaluation.base import EvaluationContext, Figure, Interrupted, mean
from trainer.evaluation.generate import generate
from trainer.evaluation.scoring import TIE, RowScores, ScoredRow, next_tokens, score_rows


class Question(NamedTuple):
    """A prompt with its answers.

    Attributes:
        prompt: the text before the answer.
        prompt_tokens: the same as tokens, at least one.
        answers: texts that should follow, each of which is asked for by itself.
        distractors: texts that should not.
    """

    prompt: str
    prompt_tokens: np.ndarray
    answers: Sequence[str]
    distractors: Sequence[str]


class Verdict(NamedTuple):
    """Result of a question.

    Attributes:
        accuracy: share of the answers that are rated above all distractors.
        exact: 1 where greedy decoding would write one of the answers, else 0.
        loss: of the answers, in nats per token.
        generated: share of the answers that a generated text holds; None where none was generated.
    """

    accuracy: float
    exact: float
    loss: float
    generated: float | None = None


def chance(distractors: int) -> float:
    """Returns the accuracy of a model that rates all candidates alike."""
    return 1 / (1 + distractors)


def ask(
    context: EvaluationContext, questions: Sequence[Question], what: str, generated: int = 0
) -> list[Verdict]:
    """Asks some questions, the same on every rank. Collective.

    Args:
        context: holds the model.
        questions: at least one.
        what: names them in messages.
        generated: tokens to generate for each question as well; 0 = none.

    Raises:
        Interrupted: a signal asked the run to stop.
    """
    tokenizer = context.tokenizer
    rows: list[ScoredRow] = []
    for question in questions:
        for text in (*question.answers, *question.distractors):
            tokens = np.asarray(tokenizer.encode(text), np.int64)
            begin = len(question.prompt_tokens)
            rows.append(next_tokens(np.concatenate([question.prompt_tokens, tokens]), begin))
    scores = score_rows(context, rows, what)
    verdicts = []
    first = 0
    for question in questions:
        candidates = len(question.answers) + len(question.distractors)
        verdict = _verdict(scores, first, len(question.answers), candidates)
        first += candidates
        if generated:
            verdict = verdict._replace(generated=_generated(context, question, generated))
        verdicts.append(verdict)
    return verdicts


def _verdict(scores: RowScores, first: int, answers: int, candidates: int) -> Verdict:
    """Judges the candidates of one question, whose rows begin at `first`."""
    rows = slice(first, first + candidates)
    count = scores.count[rows]
    # Per token, so that a longer text is not worse for its length alone.
    ratings = (scores.log_likelihood[rows] / count).tolist()
    credits = []
    for rating in ratings[:answers]:
        better = [other for other in ratings[answers:] if other > rating + TIE]
        alike = [other for other in ratings[answers:] if abs(other - rating) <= TIE]
        credits.append(0.0 if better else 1 / (1 + len(alike)))
    greedy = (scores.likeliest[rows] > count - 0.5)[:answers].any()
    return Verdict(mean(credits), float(greedy), -mean(ratings[:answers]))


def _generated(context: EvaluationContext, question: Question, count: int) -> float:
    """Returns the share of the answers that stand in a generated continuation.

    As in RULER, letter case does not count and the answers may stand in any order. The text is
    sampled in the way of the run's own samples.
    """
    text = generate(
        context.model,
        context.share,
        context.tokenizer,
        question.prompt,
        count,
        seed=context.config.seed,
        step=context.step,
        stop=context.stopped,
        cache=build_cache(context.config),
    )
    if text is None:
        raise Interrupted
    continuation = text[len(question.prompt) :].lower()
    return mean([float(answer.strip().lower() in continuation) for answer in question.answers])


def length_of(tokenizer: Tokenizer, text: str) -> int:
    """Returns the number of tokens of a text."""
    return len(tokenizer.encode(text))


def figures(cells: Sequence[dict[str, Any]], distractors: int) -> list[Figure]:
    """Returns the figures of verdicts that are gathered in cells with `accuracy`, `exact`, `loss`.

    Args:
        cells: of equal weight.
        distractors: of each question.
    """
    result = [
        Figure("accuracy", mean([cell["accuracy"] for cell in cells]), chance(distractors), cells),
        Figure("exact", mean([cell["exact"] for cell in cells])),
        Figure("answer_loss", mean([cell["loss"] for cell in cells])),
    ]
    if "generated" in cells[0]:
        result.append(Figure("generated", mean([cell["generated"] for cell in cells]), 0.0))
    return result


def cell_of(verdicts: Sequence[Verdict], **place: Any) -> dict[str, Any]:
    """Returns the means of verdicts as one cell, at a place such as length=512, depth=0.5."""
    cell: dict[str, Any] = {
        **place,
        "accuracy": mean([verdict.accuracy for verdict in verdicts]),
        "exact": mean([verdict.exact for verdict in verdicts]),
        "loss": mean([verdict.loss for verdict in verdicts]),
        "examples": len(verdicts),
    }
    generated = [verdict.generated for verdict in verdicts if verdict.generated is not None]
    if generated:
        cell["generated"] = mean(generated)
    return cell
