"""Examines a config as scripts.doctor does, from Python."""

import json
import subprocess
import sys
from collections.abc import Sequence

from trainer.config.schema import Config
from trainer.config.stages import plan_of
from trainer.errors import BUG, UserError
from trainer.library.train import environment_of_ranks
from trainer.library.words import settings_of
from trainer.preflight.prepare import load_config
from trainer.run_dir import plain_config
from trainer.verify.diagnosis import Diagnosis

MODULE = "trainer.verify.doctor_ranks"


def examine(words: str | Sequence[str]) -> list[Diagnosis]:
    """Compares the model of a config, made small, on one device and on ranks, in float64.

    Args:
        words: "mixer=sliding parallel.context=2", or a list of such settings. A config that shares
            no row is examined on three ranks.

    Returns:
        The lines of the doctor's table; `passed` tells whether a line holds.

    Raises:
        UserError: settings that cannot be honoured, or ranks that ended in an error.
    """
    with settings_of(words) as settings:
        return _examine(load_config(settings, say=lambda line: None))


def _examine(config: Config) -> list[Diagnosis]:
    stages = [plain_config(stage.config) for stage in plan_of(config)]
    with environment_of_ranks():
        # A process of its own: spawning from this one would run the caller's script again.
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            input=json.dumps(stages),
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise UserError(f"the examination failed:\n{done.stderr.rstrip()}", BUG)
    return [Diagnosis(**line) for line in json.loads(done.stdout)]
