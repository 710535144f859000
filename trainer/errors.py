"""The error that a user can mend, and the exit statuses of the command."""

# Exit statuses. 129, 130, 131 and 143 (trainer.launch.exit_report.SAVED): stopped by SIGHUP,
# SIGINT, SIGQUIT or SIGTERM after saving.
DONE = 0
BUG = 1
BAD_CONFIG = 2
BAD_RUN = 3


class UserError(Exception):
    """An error that the user can mend; its message is shown without a traceback.

    Attributes:
        code: the exit status: BAD_CONFIG for settings that cannot be honoured, found before the
            ranks start; BAD_RUN for data, disk or network that failed while running.
        again: whether starting the ranks again may mend it.
    """

    again = False

    def __init__(self, message: str, code: int = BAD_CONFIG):
        super().__init__(message)
        self.code = code
