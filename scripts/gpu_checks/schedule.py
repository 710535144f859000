"""The steps of a check of a GPU, and how they share its time.

Every step is a process of its own that starts at once: it imports, compiles and plans while others
compute, says that it is ready, and waits for its turn. So of a short time little goes into starts.
Steps that take the processor (tests, whose kernels it compiles) run together at first; those that
are timed or weighed follow one by one, in the order in which a cut-off leaves the most.
"""

from typing import NamedTuple


class Step(NamedTuple):
    """A step: a module of this folder with `prepare(dry)` and `check(prepared, seconds)`.

    Attributes:
        name: of the module.
        title: of its table.
        share: of the time that is left, beside those of the steps after it; of steps that run
            together the largest counts.
        most: seconds that it can use.
        together: whether it runs beside its neighbours.
    """

    name: str
    title: str
    share: float
    most: float
    together: bool = False


STEPS = (
    Step("drivers", "every driver, three ranks on one card", 80, 240, together=True),
    Step("attention_tests", "attention kernels against the reference", 80, 240, together=True),
    Step("scan_tests", "scan kernels against our own scan", 80, 240, together=True),
    Step("engines", "the quickstart by each engine", 80, 240, together=True),
    Step("attention_speed", "attention beside the best of PyTorch", 40, 150),
    Step("ring", "blocks of a ring beside one call", 14, 60),
    Step("scan_speed", "scans beside softmax", 18, 80),
    Step("compiled", "engine.compile", 10, 60),
    Step("planned_peak", "planned and measured peak", 14, 60),
    Step("longest_context", "longest context of an 8B model", 40, 240),
    Step("profiled", "a step of the quickstart's model at 32K", 10, 40),
)
FEWEST_S = 4.0  # a step that gets less is not begun


def seconds_for(steps: list[Step], left: float) -> float:
    """Returns the seconds of the first of the steps that are still to run, of those left."""
    first, *others = steps
    shares = first.share + sum(step.share for step in others if not step.together)
    return min(first.most, left * first.share / shares)
