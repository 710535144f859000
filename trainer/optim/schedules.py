"""The learning rate of a step, as a fraction of its peak: pure functions of (step, steps).

`step` counts from 1, the step about to be taken; `steps` is the length of the run. Every schedule
rises linearly over `warmup_steps` (step 1 trains already, step `warmup_steps` has the peak; a
longer warm-up than the run never gets there) and is `final_ratio` at the last step.
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
        """Returns the factor of this step, in [0, 1]."""
        if not self.warmup_steps:
            return 1.0
        return min(1.0, step / self.warmup_steps)


@dataclass(frozen=True)
class LinearSchedule:
    """Warm-up, then straight down to `final_ratio` of the peak.

    Raises:
        ValueError: negative warmup_steps, or `final_ratio` outside [0, 1].
    """

    warmup_steps: int = 0
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)
        _check_final(self.final_ratio)

    def __call__(self, step: int, steps: int) -> float:
        """Returns the factor of this step, in [0, 1]."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        return 1.0 - (1.0 - self.final_ratio) * _progress(step, self.warmup_steps, steps)


@dataclass(frozen=True)
class Cosine:
    """Warm-up, then half a cosine down to `final_ratio` of the peak.

    One period of Loshchilov & Hutter 2017 (arXiv:1608.03983), without its restarts.

    Raises:
        ValueError: negative warmup_steps, or `final_ratio` outside [0, 1].
    """

    warmup_steps: int = 0
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)
        _check_final(self.final_ratio)

    def __call__(self, step: int, steps: int) -> float:
        """Returns the factor of this step, in [0, 1]."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        down = 0.5 * (1.0 + math.cos(math.pi * _progress(step, self.warmup_steps, steps)))
        return self.final_ratio + (1.0 - self.final_ratio) * down


@dataclass(frozen=True)
class WarmupStableDecay:
    """Warm-up, the peak, then down to `final_ratio` over the last `decay_steps`.

    The shape is that of Hu et al. 2024 (arXiv:2404.06395): a run may be lengthened before the decay
    begins. The decay is 1 - sqrt(progress), which Haegele et al. 2024 (arXiv:2405.18392) found
    better than a straight line.

    Raises:
        ValueError: negative steps, or `final_ratio` outside [0, 1].
    """

    warmup_steps: int = 0
    decay_steps: int = 0
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)
        _check_steps("decay_steps", self.decay_steps)
        _check_final(self.final_ratio)

    def __call__(self, step: int, steps: int) -> float:
        """Returns the factor of this step, in [0, 1]."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        # A run shorter than warm-up and decay together spends what is left on the decay.
        decay_start = max(self.warmup_steps, steps - self.decay_steps)
        if step <= decay_start:
            return 1.0
        down = 1.0 - math.sqrt(_progress(step, decay_start, steps))
        return self.final_ratio + (1.0 - self.final_ratio) * down


def _progress(step: int, start: int, stop: int) -> float:
    """Returns the share of the way from `start` to `stop` that `step` has come, in [0, 1]."""
    # A warm-up as long as the run leaves a way of no steps.
    return min(1.0, max(0.0, (step - start) / max(1, stop - start)))


def _check_steps(name: str, count: int) -> None:
    if count < 0:
        raise ValueError(f"schedule.{name}={count} is no number of steps; give 0 or more")


def _check_final(final: float) -> None:
    if not 0.0 <= final <= 1.0:
        raise ValueError(
            f"schedule.final_ratio={final} is a fraction of the peak learning rate and must lie in"
            " [0, 1]"
        )
