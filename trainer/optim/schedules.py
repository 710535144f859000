"""The learning rate of a step, as a fraction of its peak: pure functions of (step, steps).

`step` counts from 1, the step about to be taken; `steps` is the length of the run. Every schedule
rises linearly over `warmup_steps` (step 1 trains already, step `warmup_steps` has the peak; a
longer warm-up than the run never gets there) and is `final` at the last step.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """Warm-up, then the peak to the end.

    Raises:
        ValueError: negative warmup_steps.
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)

    def __call__(self, step: int, steps: int) -> float:
        """The factor of this step, in [0, 1]."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0


@dataclass(frozen=True)
class LinearSchedule:
    """Warm-up, then straight down to `final` of the peak.

    Raises:
        ValueError: negative warmup_steps, or `final` outside [0, 1].
    """

    warmup_steps: int = 0
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)
        _check_final(self.final_ratio)

    def __call__(self, step: int, steps: int) -> float:
        """The factor of this step, in [0, 1]."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        return 1.0 - (1.0 - self.final_ratio) * _progress(step, self.warmup_steps, steps)


@dataclass(frozen=True)
class Cosine:
    """Warm-up, then half a cosine down to `final` of the peak (Loshchilov & Hutter 2017,
    arXiv:1608.03983, one period).

    Raises:
        ValueError: negative warmup_steps, or `final` outside [0, 1].
    """

    warmup_steps: int = 0
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)
        _check_final(self.final_ratio)

    def __call__(self, step: int, steps: int) -> float:
        """The factor of this step, in [0, 1]."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        down = 0.5 * (1.0 + math.cos(math.pi * _progress(step, self.warmup_steps, steps)))
        return self.final_ratio + (1.0 - self.final_ratio) * down


@dataclass(frozen=True)
class WarmupStableDecay:
    """Warm-up, the peak, then down to `final` over the last `decay_steps`: a run may be lengthened
    before they begin.

    The way down is 1 - sqrt(progress), which Haegele et al. 2024 (arXiv:2405.18392) found better
    than a straight line; the shape of the whole is that of Hu et al. 2024 (arXiv:2404.06395).

    Raises:
        ValueError: negative steps, or `final` outside [0, 1].
    """

    warmup_steps: int = 0
    decay_steps: int = 0
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)
        _check_steps("decay_steps", self.decay_steps)
        _check_final(self.final_ratio)

    def __call__(self, step: int, steps: int) -> float:
        """The factor of this step, in [0, 1]."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        opens = max(self.warmup_steps, steps - self.decay_steps)
        if step <= opens:
            return 1.0
        return self.final_ratio + (1.0 - self.final_ratio) * (
            1.0 - math.sqrt(_progress(step, opens, steps))
        )


def _progress(step: int, opens: int, closes: int) -> float:
    """How far `step` is from `opens` (0) to `closes` (1)."""
    return min(1.0, max(0.0, (step - opens) / max(1, closes - opens)))


def _check_steps(name: str, count: int) -> None:
    if count < 0:
        raise ValueError(f"schedule.{name}={count} is no number of steps; give 0 or more")


def _check_final(final: float) -> None:
    if not 0.0 <= final <= 1.0:
        raise ValueError(
            f"schedule.final_ratio={final} is a fraction of the peak learning rate and must lie in"
            " [0, 1]"
        )
