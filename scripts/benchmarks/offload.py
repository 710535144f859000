"""Measures activation offloading: the same step with and without it, on one device.

A decoder of attention and SwiGLU, forward and backward of one row, without and with each kind of
activation checkpointing. Peaks are of activations alone: gradients are allocated before. The loss
must have the same bits either way; gradients may differ as they do between two runs of a kernel
that adds in no fixed order.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.cost.activation_memory import activation_bytes, host_bytes
from models.feedforward import SwiGLU
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.span import Span
from parallel.activation_offload import ActivationOffload
from parallel.engines.base import CHECKPOINTING
from parallel.engines.single import Single
from parallel.mesh import Mesh
from parallel.parallelize import parallelize
from scripts.benchmarks.timing import peak_bytes

WORDS = 257
HEAD = 64
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # of a gradient's largest magnitude


@dataclass(frozen=True)
class OffloadSizes:
    """Sizes of the model and its row; every field is a word `key=value` of the command."""

    tokens: int = 16384
    width: int = 1024
    layers: int = 8


class OffloadedStep(NamedTuple):
    """Figures of one measured step.

    Attributes:
        peak_bytes: of activations; None where the system does not say.
        seconds: of forward and backward.
        loss: of the step.
        gradients: of every parameter.
        sent: bytes sent to the host.
    """

    peak_bytes: int | None
    seconds: float
    loss: float
    gradients: list[Tensor]
    sent: int


Make = Callable[[torch.device], ActivationOffload]  # what sends to the host, for a device


def measure(
    device: torch.device, precision: str, sizes: OffloadSizes, make: Make = ActivationOffload
) -> Iterator[dict[str, Any]]:
    """A row for each kind of checkpointing; `exact` says whether offloading changed nothing."""
    for checkpointing in CHECKPOINTING:
        plain, away = (
            _step(device, precision, sizes, checkpointing, each) for each in (None, make(device))
        )
        errors = [
            (a - b).abs().max() / a.abs().max().clamp_min(1e-30)
            for a, b in zip(plain.gradients, away.gradients)
        ]
        error = torch.stack(errors).max().item()
        told = [
            activation_bytes(_decoder(sizes), sizes.tokens, precision, checkpointing, each)
            for each in (False, True)
        ]
        yield {
            "checkpointing": checkpointing,
            "precision": precision,
            **asdict(sizes),
            "peak_bytes": plain.peak_bytes,
            "offloaded_peak_bytes": away.peak_bytes,
            "predicted_peak_bytes": told[0],
            "predicted_offloaded_peak_bytes": told[1],
            "sent_bytes": away.sent,
            "predicted_sent_bytes": host_bytes(
                _decoder(sizes), sizes.tokens, precision, checkpointing
            ),
            "seconds": round(plain.seconds, 4),
            "offloaded_seconds": round(away.seconds, 4),
            "loss": plain.loss,
            "gradient_error": error,
            "exact": plain.loss == away.loss and error <= TOLERANCE[precision],
        }


def _decoder(sizes: OffloadSizes) -> Decoder:
    heads = max(1, sizes.width // HEAD)
    with torch.device("meta"):
        mixers = [Attention(sizes.width, heads, heads, Rope()) for _ in range(sizes.layers)]
        feedforwards = [SwiGLU(sizes.width, 11 * sizes.width // 4) for _ in mixers]
        return Decoder(WORDS, sizes.width, mixers, feedforwards, position=Rope())


def _step(
    device: torch.device,
    precision: str,
    sizes: OffloadSizes,
    checkpointing: str,
    offload: ActivationOffload | None,
) -> OffloadedStep:
    engine = Single(Mesh.alone(device), _no_steps, precision=precision, checkpointing=checkpointing)
    parallelize(_decoder(sizes), engine, offload=offload)
    tokens = torch.arange(sizes.tokens, device=device)[None] % WORDS
    span = Span.line(1, sizes.tokens, device=device)
    losses = []

    def step() -> None:
        for parameter in engine.model.parameters():
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
            )
        loss = engine.model(MicroBatch(tokens, span, tokens)).sum() / sizes.tokens
        loss.backward()
        losses.append(loss.item())  # waits for the device

    step()  # kernels are chosen, the host's memory is pinned
    before = 0 if offload is None else offload.sent
    peak = peak_bytes(step)
    sent = 0 if offload is None else offload.sent - before
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    gradients = [p.grad.float() for p in engine.model.parameters() if p.grad is not None]
    return OffloadedStep(peak, seconds, losses[-1], gradients, sent)


def _no_steps(model: Any, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters.values(), lr=0.0)
