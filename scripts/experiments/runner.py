"""Runs many trials side by side; one that fails is reported and the others go on."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch

from scripts.experiments.trial import Trial, TrialResult, run_trial
from trainer.evaluation.held_out import HeldOutResult
from trainer.launch.parent_death import die_with_parent


class Budget(NamedTuple):
    """Size of an experiment.

    Attributes:
        seeds: number of seeds of every trial.
        jobs: processes at once.
        steps: replaces the steps of every trial; None keeps them.
        first: the first seed.
        only: one part of the experiment; None = all.
        run: a run or an export whose model is examined; None: the recipe trains its own.
        pairs: folder of the pairs of texts that the recipe trains on.
    """

    seeds: int = 3
    jobs: int = 2
    steps: int | None = None
    first: int = 0
    only: str | None = None
    run: str | None = None
    pairs: str | None = None

    def numbers(self) -> range:
        """Returns the seeds."""
        return range(self.first, self.first + self.seeds)


TrialJob = tuple[Trial, int]  # a lesson and its seed
Queue = SimpleQueue[tuple[TrialJob, "Future[TrialResult]"]]


def run_trials(
    jobs: Iterable[TrialJob], effort: Budget, say: Callable[[str], None] = print
) -> list[TrialResult]:
    """Runs trials; returns their results in the given order and says a line as each ends.

    Args:
        jobs: trials, each with one seed.
        effort: how many at once; its steps, if set, replace those of every trial.
        say: takes the lines.
    """
    queue: Queue = SimpleQueue()
    asked: list[Future[TrialResult]] = []
    for lesson, seed in jobs:
        steps = () if effort.steps is None else (f"steps={effort.steps}",)
        asked.append(Future())
        queue.put(((replace(lesson, overrides=(*lesson.overrides, *steps)), seed), asked[-1]))
    threads = [
        Thread(target=_serve, args=(queue,), daemon=True)
        for _ in range(min(effort.jobs, len(asked)))
    ]
    for thread in threads:
        thread.start()
    for number, future in enumerate(as_completed(asked), 1):
        say(f"[{number}/{len(asked)}] {result_line(future.result())}")
    for thread in threads:
        thread.join()
    return [future.result() for future in asked]


def result_line(learned: TrialResult) -> str:
    """Returns one line about how a trial ended."""
    who = f"{learned.name}, seed {learned.seed}"
    if learned.fault is not None:
        return f"{who}: FAILED: {learned.fault.strip()}"
    exams = "; ".join(f"{name}: {_figures(exam)}" for name, exam in learned.exams.items())
    return f"{who}: {exams}; {learned.seconds:.0f} s"


def _figures(exam: HeldOutResult) -> str:
    loss = "nothing to predict" if exam.loss is None else f"loss {exam.loss:.3f}"
    return ", ".join([loss, *(f"{name} {share:.3f}" for name, share in exam.graded.items())])


def _serve(queue: Queue) -> None:
    """Runs jobs until none is left; a process that dies loses its own job only."""
    pool = _pool()
    while True:
        try:
            (lesson, seed), future = queue.get_nowait()
        except Empty:
            break
        try:
            future.set_result(pool.submit(_taught, lesson, seed).result())
        except (
            Exception
        ) as error:  # told with the lesson; nobody may wait for a future that never comes
            future.set_result(
                TrialResult(
                    lesson.name, seed, fault=f"nothing came back: {type(error).__name__}: {error}"
                )
            )
            if isinstance(error, BrokenProcessPool):
                pool.shutdown()
                pool = _pool()
    pool.shutdown()


def _pool() -> ProcessPoolExecutor:
    """One process, kept from job to job: it takes seconds to start."""
    return ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
    )


def _begin(parent: int) -> None:
    die_with_parent(parent)
    torch.set_num_threads(1)


def _taught(lesson: Trial, seed: int) -> TrialResult:
    """Runs a trial in a worker; any error becomes its result."""
    try:
        return run_trial(lesson, seed)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        fault = (
            f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}, line"
            f" {place.lineno})"
        )
        return TrialResult(lesson.name, seed, fault=fault)
