"""Imports and first calls that every whole run would pay for again: done once, in the server that
tests fork from.

Libraries import lazily (torch its compiler at the first operation on the meta device, pyarrow
pandas at the first array, matplotlib its canvas at the first picture) and keep what they have
found out (fonts, parsed config files). None of it starts a thread, which a fork would lose.
"""

import gc
import importlib
import io

import pyarrow
import torch
from matplotlib.figure import Figure

from tests.support.composed_once import share_composed
from trainer.config.compose import compose

LAZY = [
    "longspan.at_start",
    "longspan.own_packages",
    "models.architectures.decoder",
    "parallel.engines.fsdp",
    "parallel.engines.single",
    "PIL.PngImagePlugin",
    "torch._dynamo",
    "torch.profiler",
    "trainer.config.help",
]

for name in LAZY:
    importlib.import_module(name)
torch.arange(2, device="meta")
pyarrow.array([1, 2])
share_composed()
compose([])
figure = Figure(layout="constrained")
figure.add_subplot().plot([1, 2], [1, 2], label="x")
figure.axes[0].legend()
figure.savefig(io.BytesIO(), format="png")
# What is there stays: collections of the forked processes need not look through it.
gc.collect()
gc.freeze()
