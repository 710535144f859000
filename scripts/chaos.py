"""python -m scripts.chaos [kills=30] [seed=0] [only=kills|faults|saves]: injects faults into a run.

Kills a small run at random moments and compares its final weights, bit for bit, with those of an
undisturbed run; then injects every other fault; then measures how long a save delays a step. Prints
what the user sees and what is lost; exit status 1 when a promise was not kept.

Takes about ten seconds of a core for each launch: a launch and a quarter for each kill, and about
25 launches more. The figures of `saves` are meaningless on cores that other processes use.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import UserError
from trainer.verify.fault_cases import inject_faults
from trainer.verify.fault_injection import FaultInjection, FaultOutcome
from trainer.verify.save_delay import measure_save_delay

DEFAULTS = {"kills": "30", "seed": "0", "only": ""}
PARTS = ("kills", "faults", "saves")
BROKEN = "NOT AS PROMISED"


def parse_words(words: Sequence[str]) -> dict[str, str]:
    """Reads the words of the command line.

    Raises:
        UserError: a word has an unknown key or a value of the wrong kind.
    """
    settings = dict(DEFAULTS)
    for word in words:
        key, _, value = word.partition("=")
        allowed = value in PARTS if key == "only" else value.isdecimal()
        if key not in DEFAULTS or not allowed:
            choices = "|".join(PARTS)
            raise UserError(f"{word}: write kills=NUMBER, seed=NUMBER or only={choices}")
        settings[key] = value
    return settings


def say(text: str) -> None:
    print(text, flush=True)


def main(words: Sequence[str]) -> int:
    settings = parse_words(words)
    parts = PARTS
    if settings["only"]:
        parts = (settings["only"],)
    outcomes: list[FaultOutcome] = []
    with tempfile.TemporaryDirectory() as folder:
        injection = FaultInjection(Path(folder), int(settings["seed"]))
        if "kills" in parts:
            outcomes += injection.kills(int(settings["kills"]), say)
        if "faults" in parts:
            for outcome in inject_faults(injection):
                verdict = "as promised" if outcome.as_promised else BROKEN
                say(f"{outcome.fault}: {verdict}")
                outcomes.append(outcome)
        if "saves" in parts:
            outcomes.append(measure_save_delay(injection))
    print("\n| what happens | what you see | what is lost | |\n|---|---|---|---|")
    for outcome in outcomes:
        verdict = "ok" if outcome.as_promised else BROKEN
        print(f"| {outcome.fault} | {outcome.shown} | {outcome.lost} | {verdict} |")
    broken = [outcome for outcome in outcomes if not outcome.as_promised]
    return int(bool(broken))


if __name__ == "__main__":
    run_command(main, __doc__)
