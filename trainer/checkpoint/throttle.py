"""Limits the processor time of a background thread that shares its cores with training."""

import threading
import time

SHARE = 0.03  # of one core
MOST_S = 60.0  # seconds that one piece of work may rest in total
SLICE = 1 << 20  # bytes between two occasions to rest


class Throttle:
    """Rests in proportion to the processor time that the thread used, to take `share` of a core.

    Args:
        share: of a core, above 0 and at most 1; 1 never rests.
        most: seconds of rest in total; afterwards the thread continues at full speed, so that all
            work ends.

    Raises:
        ValueError: `share` is out of its range.
    """

    def __init__(self, share: float = SHARE, most: float = MOST_S):
        if not 0 < share <= 1:
            raise ValueError(f"share={share} of a core must be above 0 and at most 1")
        # Seconds of rest for each second of work.
        self.ratio = 1 / share - 1
        self.left = most
        self.waited_for = threading.Event()
        self.used = 0.0

    def begin(self) -> None:
        """Starts the measurement; called by the thread before its work."""
        self.used = time.thread_time()

    def rest(self) -> None:
        """Rests if that is due; called by the thread between two slices of work."""
        # The thread's own processor time: wall time would count the waits for the disk as work.
        seconds = min(self.ratio * (time.thread_time() - self.used), self.left)
        if seconds > 0 and not self.waited_for.is_set():
            self.left -= seconds
            self.waited_for.wait(seconds)
        self.used = time.thread_time()

    def hurry(self) -> None:
        """Ends the present rest and all later ones; called by the thread that awaits the work."""
        self.waited_for.set()
