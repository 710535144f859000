"""python -m scripts.wandb_sweep KEY=VALUE,VALUE ...: the same sweep for W&B's agents, on standard
output.

    python -m scripts.wandb_sweep model=full,retnet seed=1,2,3 steps=500 > sweep.yaml
    wandb sweep sweep.yaml          # once; it prints the command of the agents
    wandb agent ENTITY/longspan/ID  # as many, on as many machines, as you like

Lists become values, interval(a,b) a range; method=grid|random|bayes says how they are searched
(grid where all are lists).
"""

import sys
from collections.abc import Sequence
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, QuotedString

from trainer.config.compose import sweep_words
from trainer.config.own.folders import own_words
from trainer.entry import run_command
from trainer.errors import DONE, UserError

METHODS = ("grid", "random", "bayes")


def plan(words: Sequence[str]) -> dict[str, Any]:
    """Returns the sweep as W&B's agents read it.

    Raises:
        UserError: the words describe no sweep.
    """
    methods = [word.removeprefix("method=") for word in words if word.startswith("method=")]
    faults: list[str] = []
    settings = sweep_words([word for word in words if not word.startswith("method=")], faults)
    if faults:
        raise UserError("\n".join(faults))
    swept = {}
    fixed = []
    for override in OverridesParser.create().parse_overrides(settings):
        value = override.value()
        if isinstance(value, IntervalSweep):
            spread = "log_uniform_values" if "log" in value.tags else "uniform"
            swept[override.key_or_group] = {
                "distribution": spread,
                "min": value.start,
                "max": value.end,
            }
        elif override.is_sweep_override():
            swept[override.key_or_group] = {
                "values": [_value(each) for each in override.sweep_iterator()]
            }
        else:
            fixed.append((override.input_line or "").lstrip("+"))
    grid = all("values" in each for each in swept.values())
    method = methods[-1] if methods else "grid" if grid else "random"
    if not swept:
        raise UserError("no setting has several values; write for example model=full,sliding")
    if method not in METHODS or (method == "grid" and not grid):
        raise UserError(f"method={method}: choose {', '.join(METHODS)}; grid needs lists of values")
    return {
        "project": "longspan",
        "method": method,
        "metric": {"name": "evaluation/held_out_loss", "goal": "minimize"},
        "parameters": swept,
        "command": [
            *("${env}", "${interpreter}", "-m", "trainer"),
            *own_words(),
            "${args_no_hyphens}",
            *fixed,
        ],
    }


def _value(value: Any) -> Any:
    """A value as YAML and W&B know it, without the quotes that Hydra's grammar needs."""
    return value.text if isinstance(value, QuotedString) else value


def main(words: list[str]) -> int:
    """Print the sweep; returns the exit status."""
    try:
        print(yaml.safe_dump(plan(words), sort_keys=False), end="")
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.code
    return DONE


if __name__ == "__main__":
    run_command(main, __doc__)
