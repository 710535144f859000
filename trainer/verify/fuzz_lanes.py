"""Runs the fuzzer's cases side by side and reports what they come to."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.verify.crew import Crews, run_in_lanes
from trainer.verify.fuzz import Fuzz, FuzzFinding

Say = Callable[[str], None]


def fuzz(
    folder: Path, seed: int, runs: int, mistakes: int, say: Say, lanes: int = 2
) -> list[FuzzFinding]:
    """Tries random runs and mistyped settings; says each finding as it comes, then the counts.

    Args:
        folder: receives data and runs.
        seed: of all cases.
        runs: number of random runs.
        mistakes: number of mistyped settings.
        say: takes a line of output.
        lanes: processes that take cases side by side.
    """
    session = Fuzz(folder, seed)
    cases = [("run", number) for number in range(runs)]
    cases += [("mistake", number) for number in range(mistakes)]
    findings: list[FuzzFinding] = []
    outcomes: Counter[str] = Counter()
    worst: dict[tuple[str, str], float] = {}
    for message in run_in_lanes(lanes, _lane, session, cases):
        if isinstance(message, tuple):
            # The last message of a lane: its counts and its largest differences.
            lane_outcomes, lane_worst = message
            outcomes.update(lane_outcomes)
            for key, difference in lane_worst.items():
                worst[key] = max(worst.get(key, 0.0), difference)
        else:
            kind, finding = message
            findings.append(finding)
            say(
                f"seed={seed} {kind} {finding.number}: {finding.problem}\n   "
                f" {' '.join(finding.words)}"
            )
    say(", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    differences = [f"{' '.join(key)} {value:.1e}" for key, value in sorted(worst.items())]
    say("largest differences: " + ", ".join(differences))
    return findings


def _lane(
    take: Callable[[], int | None],
    send: Callable[[Any], None],
    session: Fuzz,
    cases: list[tuple[str, int]],
) -> None:
    """Works through cases in a forked process, on ranks of its own."""
    # Ranks belong to the process that forked them, so the inherited ones cannot be used.
    session.crews = Crews(session.folder)
    try:
        index = take()
        while index is not None:
            kind, number = cases[index]
            check = session.runs if kind == "run" else session.mistakes
            for finding in check([number]):
                send([kind, finding])
            index = take()
    finally:
        session.close()
    send((session.outcomes, session.worst))
