"""The longest context of an 8B model whose step completes on the card in the time that is left.

Llama 3's sizes (Dubey et al. 2024, arXiv:2407.21783) with adapters of rank 16: gradients and
moments of all weights would be 96 GB more than one card has. The planner says what fits into its
memory and how long a step takes; the longest of those that end in time is tried first.
"""

import math
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import torch

from scripts.gpu_checks.card import card
from scripts.gpu_checks.planned_peak import PlannedFigures, device_name, planned
from scripts.gpu_checks.rehearsed import config_of, free, rehearse, seconds_of_a_step

SIZES = (
    "model=full model.width=4096 model.layers=32 model.heads=32 model.kv_heads=8 model.ffn=14336"
    " model.vocabulary=128256 model.tie_embeddings=false lora.rank=16 precision=bfloat16"
    " engine=fsdp engine.checkpointing=full engine.tile_tokens=8192"
)
TINY = "model=full model.width=16 model.layers=1 model.heads=2 lora.rank=2 engine=single"
PLANNED = (16384, 32768)  # contexts, through whose figures a curve is laid
TINY_PLANNED = (32, 64)
UNIT = 16384  # tokens; contexts that are tried are multiples of it
START_S = 6.0  # to build the model
SHORTER = 0.8  # of a context that did not fit
ROOM = 0.97  # of the card's memory


class ContextCheck(NamedTuple):
    """The device, the sizes, and the plans that another process makes meanwhile."""

    device: torch.device
    sizes: str
    plans: dict[int, "Future[PlannedFigures]"]


class PlannedCurve(NamedTuple):
    """Bytes as a line in the tokens T, and seconds as linear T + square T^2."""

    base_bytes: float
    bytes_a_token: float
    linear: float
    square: float

    def peak_bytes(self, tokens: int) -> float:
        """Returns the planned peak of a context."""
        return self.base_bytes + self.bytes_a_token * tokens

    def seconds(self, tokens: float) -> float:
        """Returns the planned seconds of a step."""
        return self.linear * tokens + self.square * tokens**2

    def tokens_in(self, seconds: float) -> int:
        """Returns the longest context whose step takes so long."""
        if self.square <= 0:
            return int(seconds / self.linear)
        root = math.sqrt(self.linear**2 + 4 * self.square * max(0.0, seconds))
        return int((root - self.linear) / (2 * self.square))


def curve_of(plans: dict[int, PlannedFigures]) -> PlannedCurve:
    """Returns the curve through the plans of two contexts."""
    (short, few), (long, many) = sorted(plans.items())
    slope = (many.peak_bytes - few.peak_bytes) / (long - short)
    square = (many.seconds / long - few.seconds / short) / (long - short)
    square = max(0.0, square)
    linear = few.seconds / short - square * short
    return PlannedCurve(few.peak_bytes - slope * short, slope, linear, square)


def words_of(sizes: str, tokens: int) -> str:
    """Returns the overrides of one row of so many tokens."""
    return f"{sizes} context_length={tokens} batch_tokens={tokens}"


def prepare(dry: bool) -> ContextCheck:
    """Begins to plan two contexts."""
    device = card(dry)
    sizes = TINY if dry else SIZES
    contexts = TINY_PLANNED if dry else PLANNED
    planner = ProcessPoolExecutor(len(contexts), multiprocessing.get_context("spawn"))
    plans = {}
    for tokens in contexts:
        plans[tokens] = planner.submit(planned, words_of(sizes, tokens), device_name(device))
    torch.zeros(1, device=device)
    return ContextCheck(device, sizes, plans)


def check(prepared: ContextCheck, seconds: float) -> Iterator[dict[str, object]]:
    """Yields the plan's word and a row for each context that is tried."""
    deadline = time.monotonic() + seconds
    device = prepared.device
    dry = device.type != "cuda"
    unit = TINY_PLANNED[0] if dry else UNIT
    plans = {}
    for tokens, plan in prepared.plans.items():
        plans[tokens] = plan.result(timeout=max(1.0, seconds - START_S))
    curve = curve_of(plans)
    memory = 1 << 40 if dry else torch.cuda.mem_get_info(device)[0]
    fits = int((ROOM * memory - curve.base_bytes) / curve.bytes_a_token)
    yield {"longest that fits by plan, tokens": fits, "GiB that are free": memory / 2**30}
    most = TINY_PLANNED[1] if dry else fits
    while deadline - time.monotonic() > START_S:
        left = deadline - time.monotonic()
        tokens = min(most, curve.tokens_in(left - START_S)) // unit * unit
        if tokens < unit:
            return
        row = _try(prepared, curve, tokens)
        yield row
        if row["completed"] and (dry or tokens > 0.75 * curve.tokens_in(seconds - START_S)):
            return
        if not row["completed"]:
            most = int(SHORTER * tokens)


def _try(prepared: ContextCheck, curve: PlannedCurve, tokens: int) -> dict[str, object]:
    device = prepared.device
    row: dict[str, object] = {"tokens": tokens, "planned GiB": curve.peak_bytes(tokens) / 2**30}
    row["planned s"] = curve.seconds(tokens)
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    try:
        run = rehearse(config_of(words_of(prepared.sizes, tokens).split()), device)
        row["s to build it"] = time.monotonic() - began
        row["s of the step"] = seconds_of_a_step(run, device)
        row["completed"] = True
        del run
    except torch.OutOfMemoryError as error:
        row["completed"] = False
        row["error"] = str(error)[:200]
    if device.type == "cuda":
        row["measured GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row
