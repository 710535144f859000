"""python -m scripts.chaos [kills=30] [seed=0] [only=kills|faults|saves]: break a small run in every
way.

Kills it at random moments and compares the final weights, bit for bit, with a run never stopped;
then every other fault; then how long a save holds a step up. Prints what is seen and what is lost;
exit status 1 where a promise was not kept. Ten seconds of a core for each launch, a launch and a
quarter for each kill, some 25 launches more. The figures of `saves` mean nothing on cores that
others use.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import UserError
from trainer.verify.fault_injection import FaultInjection, FaultOutcome, delay

WISHES = {"kills": "30", "seed": "0", "only": ""}
PARTS = ("kills", "faults", "saves")


def wishes(words: Sequence[str]) -> dict[str, str]:
    """What the command line asks for.

    Raises:
        Fault: a word that this command does not know.
    """
    found = dict(WISHES)
    for word in words:
        key, _, value = word.partition("=")
        if (
            key not in WISHES
            or (key == "only") != (not value.isdecimal())
            or (key == "only" and value not in PARTS)
        ):
            raise UserError(f"{word}: write kills=NUMBER, seed=NUMBER or only={'|'.join(PARTS)}")
        found[key] = value
    return found


def tell(text: str) -> None:
    print(text, flush=True)


def main(words: Sequence[str]) -> int:
    asked = wishes(words)
    parts = [asked["only"]] if asked["only"] else PARTS
    table: list[FaultOutcome] = []
    with tempfile.TemporaryDirectory() as folder:
        chaos = FaultInjection(Path(folder), int(asked["seed"]))
        if "kills" in parts:
            table += chaos.kills(int(asked["kills"]), tell)
        if "faults" in parts:
            for seen in chaos.faults():
                tell(f"{seen.fault}: {'as promised' if seen.kept else 'NOT AS PROMISED'}")
                table.append(seen)
        if "saves" in parts:
            table.append(delay(chaos))
    print("\n| what happens | what you see | what is lost | |\n|---|---|---|---|")
    for seen in table:
        print(
            f"| {seen.fault} | {seen.shown} | {seen.lost} |"
            f" {'ok' if seen.kept else 'NOT AS PROMISED'} |"
        )
    return int(not all(seen.kept for seen in table))


if __name__ == "__main__":
    run_command(main, __doc__)
