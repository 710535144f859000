"""Takes the config that a run directory records, where the command names the directory alone."""

from collections.abc import Sequence
from pathlib import Path

from trainer import run_dir
from trainer.config.explain import value_at
from trainer.config.schema import Config
from trainer.config.trust import stranger, targets
from trainer.config.values import quoted_value
from trainer.errors import UserError

KEY = "run_dir="
# Parts that are no part of a model, which is all that `stranger` knows, and where ours lie.
BESIDE_THE_MODEL = {"evaluation.": "trainer.evaluation.", "logger.": "trainer.logs.loggers."}
# Settings that are run as commands, here or by Slurm.
COMMANDS = ("log.on_event", "launch.setup", "launch.options")


def recorded_config(words: Sequence[str]) -> Config | None:
    """Returns the config of the run that goes on; None where the words ask for something else.

    Args:
        words: of the command line. `run_dir=PATH` alone goes on with the run that lies there.

    Raises:
        UserError: the record cannot be read, or names classes that are not Longspan's. A record may
            be a stranger's, while the settings of a command line are the user's own.
    """
    if len(words) != 1 or not words[0].startswith(KEY):
        return None
    directory = Path(words[0].removeprefix(KEY))
    if run_dir.linked(directory) or not run_dir.holds_run(directory):
        return None
    try:
        config = run_dir.read_config(directory)
    except (ValueError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{words[0]}: {run_dir.CONFIG} cannot be read ({first}); choose another run_dir"
        ) from error
    tree = run_dir.plain_config(config)
    for place, target in targets(tree):
        group = f"{place.partition('.')[0]}."
        home = BESIDE_THE_MODEL.get(group)
        if home is not None and str(target).startswith(home):
            continue
        if fault := stranger(place, target):
            raise UserError(
                f"{words[0]}: {fault}, and a record may be somebody else's; give the settings of"
                " the command again"
            )
    for key in COMMANDS:
        value = value_at(tree, key)
        if value:
            raise UserError(
                f"{words[0]}: {key}={quoted_value(value)} is a command, and a record may be"
                " somebody else's; give the settings of the command again"
            )
    # It goes on: resume=never was said to a directory that held no run yet.
    return config.model_copy(update={"run_dir": str(directory), "resume": "auto"})
