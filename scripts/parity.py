"""python -m scripts.parity [quick] | KEY=VALUE ...: layers cut over ranks against one device.

Without words: every mixer of Longspan, cut in every way; prints the table of the README. A cell is
the largest relative difference of any output or gradient in float64, over all layouts and 2, 3 and
4 ranks; `quick` takes a covering part of them.

With settings of a run, as mixer._target_=mine.Averaged or mixer=sliding: the small twin of that
model, its losses and all gradients, under every method and layout on 2, 3 and 4 ranks.

Exit status 1 when a figure is above its bound, 2 for settings that are refused.
"""

import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from trainer.entry import run_command
from trainer.errors import BAD_CONFIG, UserError
from trainer.verify.part_parity import METHODS, Comparison, compare_part

TESTS = Path(__file__).parents[1] / "tests" / "parallel" / "drivers" / "test_parity.py"


def outcomes(words: list[str]) -> list[tuple[list[str], dict[str, float] | None]]:
    """(mixer, method, layout, ranks) and the differences by dtype of every case; None where it
    failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = "-o", "addopts=", "--import-mode=importlib", f"--junitxml={report}"
        command = [sys.executable, "-m", "pytest", str(TESTS), *options]
        subprocess.run([*command, *words], stdout=subprocess.DEVNULL, check=False)
        found = []
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            name = case.get("name", "").partition("[")[2].rstrip("]").split("-")
            failed = case.find("failure") is not None or case.find("error") is not None
            values = {
                p.get("name", ""): float(p.get("value", "nan")) for p in case.iter("property")
            }
            found.append((name, None if failed else values))
        return found


def main(words: list[str]) -> int:
    if words and words != ["quick"]:
        return part(words)
    if not TESTS.is_file():
        raise UserError(f"the table needs {TESTS}, of a checkout; give settings, as mixer=sliding")
    cells: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for (mixer, method, *_), values in outcomes(["-k", "not every"] if words else []):
        cells[mixer][method].append(values)
    methods = list(dict.fromkeys(m for row in cells.values() for m in row))
    print(f"| mixer | {' | '.join(methods)} |\n|{'---|' * (1 + len(methods))}")
    for mixer, row in cells.items():
        shown = [_cell(row[method]) for method in methods]
        print(f"| {mixer} | {' | '.join(shown)} |")
    cases = [values for row in cells.values() for some in row.values() for values in some]
    failed = sum(values is None for values in cases)
    print(f"\n{len(cases)} cases, {failed} failed")
    return int(failed > 0 or not cases)


def part(words: Sequence[str]) -> int:
    """Compares the model of some settings in every way and prints a table; returns the status."""
    if wrong := [word for word in words if word.lstrip("+").startswith("parallel.")]:
        print(f"{wrong[0]}: every way is tried; leave it out", file=sys.stderr)
        return BAD_CONFIG
    found = list(compare_part(words))
    rows = list(dict.fromkeys((each.layout, each.ranks) for each in found))
    print(f"| layout | ranks | {' | '.join(METHODS)} |\n|{'---|' * (2 + len(METHODS))}")
    for layout, ranks in rows:
        here = {each.method: each for each in found if (each.layout, each.ranks) == (layout, ranks)}
        print(f"| {layout} | {ranks} | {' | '.join(_shown(here.get(m)) for m in METHODS)} |")
    for refusal in dict.fromkeys(each.refusal for each in found if each.refusal):
        print(f"\n-: {refusal}")
    compared = [each for each in found if each.figure is not None]
    failed = sum(not each.passed for each in compared)
    print(f"\n{len(compared)} cases, {failed} failed")
    return int(failed > 0 or not compared)


def _shown(case: Comparison | None) -> str:
    if case is None or case.figure is None:
        return "-"
    return f"{case.figure:.0e}{'' if case.passed else ' FAULT'}"


def _cell(some: list) -> str:
    """The worst float64 difference of some cases, or how many failed."""
    failed = sum(values is None for values in some)
    if failed:
        return f"FAILED {failed}/{len(some)}"
    return f"{max(values['float64'] for values in some):.0e}" if some else "-"


if __name__ == "__main__":
    run_command(main, __doc__)
