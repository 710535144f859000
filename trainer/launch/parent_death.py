"""Ends a rank with the process that started it, however that process ends."""

import ctypes
import os
import signal
import sys
import threading
import time

LOOK_S = 0.5  # between two looks at the launcher
SET_PDEATHSIG = 1  # prctl's option, linux/prctl.h


def die_with_parent(launcher: int) -> None:
    """Lets this rank be killed when the launcher's process ends.

    Args:
        launcher: process number of the launcher, or of any ancestor that must be alive.

    Two ways, because each has a hole: the kernel's parent-death signal is lost if the launcher is
    gone before we ask for it, and is Linux only; a thread that looks at the parent's number sleeps
    between two looks. The kernel's signal means the end of the *thread* that started us, so ranks
    must be started from the launcher's main thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and is_alive(launcher):
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def is_alive(process: int) -> bool:
    """Tells whether there is a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
