"""The commands that the last screen of a run proposes."""

import shlex
from pathlib import Path

from trainer.config.schema import Config

QUICKSTART_NEXT = (  # commands that the last screen of a first run proposes
    "python -m trainer experiment=quickstart mixer=sliding mixer.window=256   another architecture",
    (
        "python -m trainer experiment=quickstart parallel.context=4              the same losses"
        " over four ranks"
    ),
    "python -m trainer --help                                                every setting",
)


def next_commands(config: Config, directory: Path) -> tuple[str, ...]:
    """Returns the commands that the last screen proposes, after those of its own."""
    if config.name == "quickstart":
        return QUICKSTART_NEXT
    return (f"python -m scripts.report {shlex.quote(str(directory))}   this run as one page",)
