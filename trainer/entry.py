"""Entry point of every command: safe output streams, --help, and the exit status."""

import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from trainer.config.own.folders import searching
from trainer.data.folders import furnish
from trainer.errors import UserError
from trainer.launch.exit_report import SAVED
from trainer.logs.streams import protect

HELP = ("-h", "--help")


def run_command(main: Callable[[list[str]], int], help_text: str | None = None) -> NoReturn:
    """Runs a command with the words of the command line, and exits with its status.

    Args:
        main: takes the words, returns the exit status.
        help_text: printed instead where --help or -h is among the words; None where `main` answers
            that itself.
    """
    protect()
    words = sys.argv[1:]
    if help_text is not None and asks_for_help(words):
        print(help_text.strip())
        sys.exit(0)
    try:
        furnish()
        with searching(words) as settings:
            status = main(settings)
    except UserError as fault:
        print(fault, file=sys.stderr)
        status = fault.code
    except KeyboardInterrupt:
        status = SAVED[signal.SIGINT]
    sys.exit(status)


def asks_for_help(words: Sequence[str]) -> bool:
    """Tells whether one of the words is -h or --help."""
    return any(word in HELP for word in words)
