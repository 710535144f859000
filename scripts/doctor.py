"""python -m scripts.doctor KEY=VALUE ...: proves that sharing the sequence changes nothing.

Takes the overrides of a run and examines that very config before step 1. Prints a table; exit
status 1 when a line of it fails, 2 for a config that is refused. doctor.break=mask|scale|leak|order
sabotages one driver, so that a fault must be reported.
"""

import sys
from collections.abc import Sequence

from trainer.config.stages import Stage, plan_of
from trainer.entry import run_command
from trainer.errors import BAD_CONFIG, UserError
from trainer.preflight.prepare import load_config
from trainer.verify.diagnosis_table import show
from trainer.verify.doctor_ranks import examine_stage, ranks_of
from trainer.verify.sabotage import BREAKS

BREAK = "doctor.break="


def main(words: Sequence[str]) -> int:
    sabotage = None
    overrides = []
    for word in words:
        if not word.startswith(BREAK):
            overrides.append(word)
        elif sabotage is None:
            sabotage = word.removeprefix(BREAK)
    try:
        if sabotage is not None and sabotage not in BREAKS:
            choices = ", ".join(BREAKS)
            raise UserError(f"unknown {BREAK}{sabotage}; choose one of {choices}")
        config = load_config(overrides)
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    passed = [diagnose(stage, sabotage) for stage in plan_of(config)]
    return int(not all(passed))


def diagnose(stage: Stage, sabotage: str | None) -> bool:
    """Examines the settings of one stage and prints the table; returns whether all is well."""
    config = stage.config
    findings = examine_stage(config, sabotage)
    method = f"{config.parallel.method}, {config.parallel.layout}"
    name = config.name if stage.count == 1 else f"{config.name}, {stage.label}"
    show(findings, f"{name}: one device against {ranks_of(config)} ranks ({method}), float64")
    return all(finding.passed for finding in findings)


if __name__ == "__main__":
    run_command(main, __doc__)
