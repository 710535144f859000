"""Errors that a user can mend, and the exit statuses of the command."""

# Exit statuses. 129, 130, 131 and 143 (trainer.launch.exit_report.SAVED): stopped by SIGHUP,
# SIGINT, SIGQUIT or SIGTERM after saving.
DONE = 0
BUG = 1
BAD_CONFIG = 2
BAD_RUN = 3


class UserError(Exception):
    """What the user can mend, in the user's words: shown without a traceback.

    code: the exit status; 2 = the wish cannot be honoured (found before the ranks start), 3 = data,
    disk or network failed while running.
    again: whether starting the ranks again may mend it.
    """

    again = False

    def __init__(self, message: str, code: int = BAD_CONFIG):
        super().__init__(message)
        self.code = code
