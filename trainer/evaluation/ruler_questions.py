"""Questions with paragraphs that answer them, from a local file."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LARGEST = 1 << 30  # bytes of a file


class QuestionAnswer(NamedTuple):
    """A question, the texts that answer it, and the paragraphs that hold an answer."""

    question: str
    answers: list[str]
    paragraphs: list[str]


def read_questions(path: Path) -> list[QuestionAnswer]:
    """Reads the questions of a file.

    Three forms are known: SQuAD's (`data`, `paragraphs`, `qas`; those that have no answer are left
    out), HotpotQA's (a list of `question`, `answer`, `context`), and ours: a list, or one object a
    line, of {"question", "answers": [text, ...], "paragraphs": [text, ...]}.

    Raises:
        ValueError: the file cannot be read, or has no question, or one without answer.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it cannot be read ({error})") from error
    questions = []
    for number, entry in enumerate(_entries(text), 1):
        questions.append(_checked(entry, number))
    if not questions:
        raise ValueError("it holds no question")
    return questions


def _entries(text: str) -> Iterator[QuestionAnswer]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _json_lines(text)
    if isinstance(value, Mapping) and "data" in value:
        yield from _squad(value)
        return
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("it is no list of questions")
    for entry in value:
        if not isinstance(entry, Mapping):
            raise ValueError("it is no list of questions")
        if "context" in entry:
            yield _hotpot(entry)
        else:
            answers = entry.get("answers", [entry["answer"]] if "answer" in entry else [])
            yield QuestionAnswer(entry.get("question", ""), answers, entry.get("paragraphs", []))


def _json_lines(text: str) -> list[Any]:
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is no JSON") from error
    return values


def _squad(value: Mapping[str, Any]) -> Iterator[QuestionAnswer]:
    try:
        for article in value["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    if entry.get("is_impossible"):
                        continue
                    answers = [answer["text"] for answer in entry["answers"]]
                    yield QuestionAnswer(entry["question"], answers, [paragraph["context"]])
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is not in SQuAD's form ({error})") from error


def _hotpot(entry: Mapping[str, Any]) -> QuestionAnswer:
    try:
        paragraphs = [f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]]
        return QuestionAnswer(entry["question"], [entry["answer"]], paragraphs)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is not in HotpotQA's form ({error})") from error


def _checked(entry: QuestionAnswer, number: int) -> QuestionAnswer:
    if not isinstance(entry.question, str) or not entry.question.strip():
        raise ValueError(f"its entry {number} has no question")
    for name, texts in (("answers", entry.answers), ("paragraphs", entry.paragraphs)):
        is_text = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
        if not is_text or not texts:
            raise ValueError(f"its question {number} has no {name} ({entry.question[:60]!r})")
    return entry
