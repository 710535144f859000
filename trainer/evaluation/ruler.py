"""RULER: thirteen tasks of retrieval, tracking, counting and reading, at any length."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from models.ranges import Range
from trainer.config.finding import Finding
from trainer.config.node_checks import nearest
from trainer.evaluation.base import Evaluation, EvaluationContext, Every, Figure, RunFacts, mean
from trainer.evaluation.questions import Question, ask, cell_of, figures
from trainer.evaluation.ruler_questions import QuestionAnswer, read_questions
from trainer.evaluation.ruler_tasks import ANSWER_TOKENS, QUESTION_TASKS, TASKS, RulerWriter
from trainer.evaluation.words import REPEATED, held_out_tokens

RulerLength = Annotated[int, Range(64, 2**24)]


class Ruler(Evaluation):
    """Scores the answers of RULER's tasks against distractors, and optionally generated texts.

    Args:
        tasks: names of tasks; None = all that need no file, and those whose file is given.
        lengths: tokens of a prompt with room for its answer; None = the context length.
        examples: of each task and length.
        distractors: wrong answers of each example; chance is 1 / (1 + this).
        generate: whether to generate a text as well and look for the answers in it, as RULER does.
        squad, hotpot: files of questions for qa_squad and qa_hotpot, in the form of those data
            sets or as trainer/evaluation/ruler_questions.py says.
        every: as in Evaluation.

    Source: Hsieh et al. 2024 (arXiv:2404.06654); how we differ stands in ruler_tasks.py.
    """

    needs_text = True

    def __init__(
        self,
        *,
        tasks: list[str] | None = None,
        lengths: list[RulerLength] | None = None,
        examples: Annotated[int, Range(1, 4096)] = 4,
        distractors: Annotated[int, Range(1, 64)] = 7,
        generate: bool = False,
        squad: str | None = None,
        hotpot: str | None = None,
        every: Every = None,
    ):
        super().__init__(every=every)
        if tasks == [] or lengths == []:
            raise ValueError("tasks and lengths must not be empty; name one at least")
        self.files = {"qa_squad": squad, "qa_hotpot": hotpot}
        self.asked = tasks
        self.tasks = tasks or [task for task in TASKS if self.files.get(task, "") is not None]
        self.lengths = lengths
        self.examples = examples
        self.distractors = distractors
        self.generate = generate
        self._questions: dict[str, list[QuestionAnswer]] | None = None

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        for task in self.tasks:
            if task not in TASKS:
                yield Finding(
                    facts.key("tasks"),
                    self.asked,
                    f"there is no task {task}{nearest(task, TASKS)}",
                )
                return
        try:
            questions = self.questions()
        except ValueError as error:
            yield Finding(sentence=f"evaluation.{facts.name}.{error}")
            return
        writer = RulerWriter(facts.tokenizer, REPEATED, questions, self.distractors)
        for length in self.lengths or [facts.config.context_length]:
            faults = [*facts.check_length("lengths", self.lengths, length)]
            yield from faults
            for task in self.tasks if not faults else ():
                try:
                    writer.write(task, length, 0)
                except ValueError as error:
                    remedy = "use longer ones, or name tasks that fit"
                    stated = self.lengths or [length]
                    yield Finding(facts.key("lengths"), stated, str(error), remedy)

    def run(self, context: EvaluationContext) -> list[Figure]:
        lengths = self.lengths or [context.config.context_length]
        tokenizer = context.tokenizer
        essay = tokenizer.decode(held_out_tokens(context, 2 * max(lengths)))
        writer = RulerWriter(tokenizer, essay, self.questions(), self.distractors)
        cells: list[dict[str, Any]] = []
        for task in self.tasks:
            for length in lengths:
                questions = []
                for number in range(self.examples):
                    example = writer.write(task, length, number)
                    tokens = np.asarray(tokenizer.encode(example.prompt), np.int64)
                    questions.append(
                        Question(example.prompt, tokens, example.answers, example.distractors)
                    )
                generated = ANSWER_TOKENS[task] if self.generate else 0
                verdicts = ask(context, questions, f"{task} at {length}", generated)
                cells.append(cell_of(verdicts, task=task, length=length))
        result = figures(cells, self.distractors)
        for task in self.tasks:
            own = [cell["accuracy"] for cell in cells if cell["task"] == task]
            result.append(Figure(task, mean(own), result[0].chance))
        return result

    def questions(self) -> dict[str, list[QuestionAnswer]]:
        """Returns the questions of the tasks that read a file.

        Raises:
            ValueError: `KEY=VALUE: fact; remedy` about a file.
        """
        if self._questions is None:
            loaded = {}
            for task in QUESTION_TASKS:
                if task not in self.tasks:
                    continue
                key = task.removeprefix("qa_")
                path = self.files[task]
                if path is None:
                    raise ValueError(
                        f"{key}=null: {task} reads its questions from a file; name one, or leave"
                        " the task out"
                    )
                try:
                    loaded[task] = read_questions(Path(path))
                except ValueError as error:
                    raise ValueError(
                        f"{key}={path}: {error}; give a file of questions with answers and"
                        " paragraphs"
                    ) from error
            self._questions = loaded
        return self._questions
