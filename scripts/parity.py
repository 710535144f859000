"""python -m scripts.parity [quick]: every mixer, cut in every way, against one device; prints the
table of the README.

A cell is the largest relative difference of any output or gradient in float64, over all layouts and
2, 3 and 4 ranks; `quick` takes a covering part of them. Exit status 1 when one is above its bound,
in float64 or in float32.
"""

import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from trainer.entry import run_command

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
    if words not in ([], ["quick"]):
        print("python -m scripts.parity takes no words but `quick`", file=sys.stderr)
        return 2
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


def _cell(some: list) -> str:
    """The worst float64 difference of some cases, or how many failed."""
    failed = sum(values is None for values in some)
    return (
        f"FAILED {failed}/{len(some)}"
        if failed
        else f"{max(v['float64'] for v in some):.0e}"
        if some
        else "-"
    )


if __name__ == "__main__":
    run_command(main, __doc__)
