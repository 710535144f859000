"""Finds the events of a run: those that W&B sends a message about, by `wandb.alerts`, and all for
`log.on_event`."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from trainer.logs.jsonl import MetricsRow
from trainer.logs.redact import redacted

KINDS = ("spike", "skipped", "hang", "end")
WINDOW = 128  # gradient norms of logged steps that the median is taken of
LEAST = 16  # fewer tell nothing of what is usual
USUAL = 5.0  # times the median that make a spike, where optim.skip_above gives no number of its own

Send = Callable[[str, str], None]  # (title, text)
Tell = Callable[..., None]  # (kind, **facts)


class Alerts:
    """Sends an alert for each event of a wanted kind.

    Args:
        wanted: kinds; True = all.
        name: of the run.
        spike: optim.skip_above; with 0, USUAL is the limit.
        send: takes a title and a text.
        tell: takes every event, whatever is wanted; see trainer/logs/event_command.py.
    """

    def __init__(
        self,
        wanted: bool | Sequence[str],
        name: str,
        spike: float,
        send: Send,
        tell: Tell = lambda kind, **facts: None,
    ):
        self.wanted = frozenset(KINDS if wanted is True else wanted or ())
        self.name = name
        self.limit = spike or USUAL
        self.send = send
        self.tell = tell
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def step(self, row: MetricsRow) -> None:
        """Checks a logged step: was it skipped, or is its gradient norm a spike?"""
        norm = row.grad_norm
        is_spike = False
        usual = math.inf
        if len(self.norms) >= LEAST:
            usual = median(self.norms)
        if norm is not None and math.isfinite(norm):
            is_spike = norm > self.limit * usual
            # Appended after the comparison: a spike must not raise its own limit.
            self.norms.append(norm)
        if is_spike:
            self.tell("spike", step=row.step, grad_norm=norm, usual=usual)
            self._tell(
                "spike",
                "gradient spike",
                f"step {row.step}: gradient norm {norm:.4g}, usual {usual:.4g}",
            )
        if row.skipped is not None:
            self.tell("skip", step=row.step, why=row.skipped["why"])
        # A skipped spike is one event, and one message.
        already_sent = is_spike and "spike" in self.wanted
        if row.skipped is not None and not already_sent:
            self._tell(
                "skipped", "step skipped", f"step {row.step} was skipped: {row.skipped['why']}"
            )

    def ended(self, head: str, text: str, **facts: Any) -> None:
        """Sends that the run ended, in order or not.

        Args:
            head: finished, stopped or failed, and where.
            text: the figures that it came to, or the error.
            facts: for `tell`, by name.
        """
        self.tell("end", outcome=head, **facts)
        self._tell("end", head, text)

    def hung(self, text: str) -> None:
        """Sends that ranks waited too long for one another."""
        self.tell("hang", why=text)
        self._tell("hang", "ranks hang", text)

    def wants(self, kind: str) -> bool:
        """Reports that alerts of a kind are sent."""
        return kind in self.wanted

    def _tell(self, kind: str, head: str, text: str) -> None:
        if kind in self.wanted:
            self.send(f"{head}: {self.name}", redacted(text))
