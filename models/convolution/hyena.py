"""Hyena: gates between convolutions as long as the sequence, their filters written by a small
network of the distance.

Letters: B rows, T tokens, L taps.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.convolution.short_conv import DepthwiseConv, uniform
from models.init import Rule, constant
from models.layer import Layer
from models.primitives.long_conv import LongConv
from models.ranges import Few, Many, Positive
from models.span import Span

# decay over context_length: to 1 % within 0.3 and 1.5 of it
FAST = math.log(100) / 0.3
SLOW = math.log(100) / 1.5


class HyenaFilter(Layer):
    """A filter per channel as a function of the distance: sines of a small network, faded out by a
    decay per channel.

    Args:
        channels: how many filters.
        length: taps; the distance is told to the network in units of it.
        hidden: width of the network.
        bands: frequencies in its input.
        speed: of the sines, learned from there.
        rate: of learning, in units of the model's. Weight decay leaves all of it alone, as in the
            paper's code.
    """

    no_weight_decay = "layers", "frequency", "last"

    def __init__(
        self, channels: int, length: int, hidden: int, bands: int, speed: float, rate: float = 1.0
    ):
        super().__init__()
        if not 0 < rate < math.inf:
            raise ValueError(
                f"filter_rate={rate} is a factor of the learning rate and must be above 0; 1 is the"
                " model's own"
            )
        self.lr_scale = dict.fromkeys(self.no_weight_decay, rate)
        self.length = length
        self.bands = bands
        self.speed = speed
        self.positions_per_step = (
            length  # its weights see these instead of tokens (models/cost/flops.py)
        )
        sizes = [1 + 2 * bands, hidden, hidden]
        self.sizes = sizes
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:]))
        self.frequency = nn.Parameter(torch.empty(hidden))
        self.last = nn.Linear(hidden, channels, bias=False)

    def init_rules(self) -> dict[str, Rule]:
        rules: dict[str, Rule] = {
            "frequency": constant(self.speed),
            "last.weight": uniform(self.last.in_features**-0.5),
        }
        for i, size in enumerate(self.sizes[:-1]):
            bound = uniform(size**-0.5)
            rules |= {f"layers.{i}.weight": bound, f"layers.{i}.bias": bound}
        return rules

    def forward(self) -> Tensor:
        """[L, channels], float32 or wider: in bfloat16, distances above 256 could not be told
        apart."""
        weight = self.last.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        time = torch.arange(self.length, device=weight.device, dtype=wide)[:, None] / self.length
        waves = torch.linspace(
            1e-4, max(self.bands - 1, 1e-4), self.bands, device=weight.device, dtype=wide
        )
        angle = 2 * math.pi * time * waves
        x = torch.cat([time, angle.cos(), -angle.sin()], -1)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            x = (self.frequency * F.linear(x, layer.weight.to(wide), layer.bias.to(wide))).sin()
        fade = torch.linspace(SLOW, FAST, len(weight), device=weight.device, dtype=wide)
        return F.linear(x, weight.to(wide)) * (-time * fade).exp()


class Hyena(Layer):
    """v <- gate * v, then v <- filter (*) v + bias * v, for `order` gates; documents do not mix.

    Args:
        width: of input and output.
        context_length: longest document in tokens, the length of the filters.
        order: gates; one long filter fewer.
        conv_kernel: of the short filter before.
        filter_width, bands, speed, filter_rate: see Filter.

    Source: Poli et al. 2023 (arXiv:2302.10866). Where its code cuts longer sequences off in
    silence, a document longer than the filter is an error; gates and filters alternate in the order
    of that code, the first gate multiplying last.
    """

    no_weight_decay = ("bias",)

    def __init__(
        self,
        width: int,
        context_length: int,
        *,
        order: Few = 2,
        conv_kernel: int = 3,
        filter_width: Many = 64,
        bands: Many = 16,
        speed: Positive = 10.0,
        filter_rate: Positive = 1.0,
    ):
        super().__init__()
        if order < 2:
            raise ValueError(
                f"order={order} has no long filter; a Hyena layer has order - 1 of them, choose 2"
                " or more"
            )
        self.order = order
        self.max_length = context_length
        self.inner = nn.Linear(width, (order + 1) * width, bias=False)
        self.short = DepthwiseConv((order + 1) * width, conv_kernel)
        self.filter = HyenaFilter(
            (order - 1) * width, context_length, filter_width, bands, speed, filter_rate
        )
        self.bias = nn.Parameter(torch.empty(order - 1, width))
        self.out = nn.Linear(width, width, bias=False)
        self.mix = nn.ModuleList(LongConv() for _ in range(order - 1))

    def init_rules(self) -> dict[str, Rule]:
        return {"bias": lambda shape, generator: torch.randn(shape, generator=generator)}

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        *gates, value = self.short(self.inner(x), span).chunk(self.order + 1, -1)
        filters = self.filter().chunk(self.order - 1, -1)
        for gate, taps, bias, mix in zip(
            reversed(gates[1:]), filters, self.bias, self.mix, strict=True
        ):
            value = gate * value
            value = mix((value,), (taps,), span=span) + bias * value
        return self.out(gates[0] * value)
