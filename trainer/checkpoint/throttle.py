"""How fast a thread in the background may go where training computes on the same cores: little and
often."""

import threading
import time

# of a core; seconds of rest that one piece of work may add up to
SHARE = 0.03
MOST_S = 60.0
SLICE = 1 << 20  # bytes after which a writer looks whether it is time for a rest


class Throttle:
    """Rests in proportion to the processor time that the thread has used, so that it takes `share`
    of a core.

    Args:
        share: of a core, above 0 and at most 1; 1 never rests.
        most: seconds of rest in all; afterwards the thread goes on at full speed, so that no work
            takes for ever.
    """

    def __init__(self, share: float = SHARE, most: float = MOST_S):
        if not 0 < share <= 1:
            raise ValueError(f"share={share} of a core must be above 0 and at most 1")
        self.ratio = 1 / share - 1
        self.left = most
        self.waited_for = threading.Event()
        self.used = 0.0

    def begin(self) -> None:
        """Called by the thread before its work."""
        self.used = time.thread_time()

    def rest(self) -> None:
        """Called by the thread between two slices of work."""
        wish = min(self.ratio * (time.thread_time() - self.used), self.left)
        if wish > 0 and not self.waited_for.is_set():
            self.left -= wish
            self.waited_for.wait(wish)
        self.used = time.thread_time()

    def hurry(self) -> None:
        """Called by anyone who now waits for the work: there are no more rests."""
        self.waited_for.set()
