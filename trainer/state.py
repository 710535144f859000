"""Where a run stands: what a checkpoint holds beside tensors, and how a run goes on from one."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parallel.engines.engine import Engine
from trainer.archive import Archive, Saved
from trainer.config import BAD_RUN, Fault
from trainer.lanes import Lanes


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps taken.
        tokens: trained on since the beginning.
        cursor: of the training data, for the next step.
        wandb_id: of the W&B run, so that a resumed run goes on in it; None without one.
        skipped: steps that were not taken, one after another, up to now (trainer/guard.py).
        norms: gradient norms of the last steps, for optim.spike.
    """

    cursor: dict[str, Any]
    step: int = 0
    tokens: int = 0
    wandb_id: str | None = None
    best: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    norms: list[float] = field(default_factory=list)

    def extra(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return asdict(self)


def restore(archive: Archive, place: Path, engine: Engine, lanes: Lanes | None = None) -> Progress:
    """Put the engine and the lanes into the state of a checkpoint, whatever ranks wrote it, and say how far it had come."""
    carried = {} if lanes is None else {"past": archive.blank(place, "past")}
    saved: Saved = archive.load(place, engine.state() | carried)
    if lanes is not None:
        lanes.load(saved.state.pop("past"))
    engine.load(saved.state)
    try:
        return Progress(**saved.extra)
    except TypeError as error:
        raise Fault(f"cannot resume from {place}: it was written by another version of Longspan ({error})", BAD_RUN) from error
