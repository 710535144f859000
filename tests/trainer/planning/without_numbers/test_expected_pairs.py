"""Plans follow the pairs that LSH and compressed attention choose, as the real layers do."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.attention.compressed import Compressed
from models.attention.lsh import LSHAttention
from models.init import initialise
from models.kernels.pairs import chosen_pairs, readings
from models.positions.rope import Rope
from models.span import Span
from tests.support.pool import ranks
from tests.trainer.planning.test_step_plan import WORDS, config_of, measured
from trainer.planning.devices import read_device
from trainer.planning.planned_layer import plan_layer
from trainer.planning.step_costs import StepCosts
from trainer.planning.step_plan import plan_step
from trainer.planning.without_numbers.expected_pairs import expected_pairs
from trainer.planning.without_numbers.fake_arithmetic import FakeArithmetic

WIDTH = 64
TOKENS = 1500  # fills no tile, no bucket and no block
LAYERS = {
    "lsh": lambda: LSHAttention(WIDTH, 4, Rope(), 0, 3, TOKENS, chunk_size=32, hashes=3),
    "compressed": lambda: Compressed(WIDTH, 4, Rope(), block=7, top=20, window=40),
}


def loss_of(layer, output):
    if isinstance(layer, Compressed):
        return output.sum() + layer.auxiliary["indexer"].sum()
    return output.sum()


def even_hashes(hashed):
    """Returns what stands for LSHAttention.hashed: as many products, and numbers that are drawn."""

    def drawn(layer, query):
        shape = hashed(layer, query).shape
        generator = torch.Generator().manual_seed(7)
        return torch.randint(layer.buckets, shape, generator=generator)

    return drawn


def counted(build):
    """FLOPs of the real layer, forward and backward."""
    layer = initialise(build(), seed=0)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, TOKENS, WIDTH, generator=generator).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        loss = loss_of(layer, layer(hidden, Span.line(2, TOKENS)))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(
    ("name", "is_even", "tolerance"),
    # Hashes of a new layer are not as even as a plan takes them to be.
    [("lsh", True, 0.03), ("lsh", False, 0.12), ("compressed", False, 0.03)],
)
def test_planned_flops_are_those_of_the_real_layer(name, is_even, tolerance, monkeypatch):
    with monkeypatch.context() as patch:
        if is_even:
            patch.setattr(LSHAttention, "hashed", even_hashes(LSHAttention.hashed))
        forward, backward = counted(LAYERS[name])
    plan = plan_layer(LAYERS[name], (2, TOKENS, WIDTH), read_device("cpu"), loss_of=loss_of)
    assert plan.forward.flops == pytest.approx(forward, rel=tolerance)
    assert plan.backward.flops == pytest.approx(backward, rel=tolerance)


@pytest.mark.parametrize("device", ["cpu", "h100"])
@pytest.mark.parametrize("name", LAYERS)
def test_planned_flops_and_seconds_grow_with_the_choice_and_not_with_pairs(name, device):
    def plan(tokens):
        shape = (1, tokens, WIDTH)
        return plan_layer(LAYERS[name], shape, read_device(device), loss_of=loss_of)

    few = plan(4096)
    many = plan(8192)
    # Indexers look at all summaries, whose products are one thirtieth of those of all pairs here.
    most = 3.2 if name == "compressed" else 2.6
    assert 1.9 < many.forward.flops / few.forward.flops < most
    assert many.seconds < most * few.seconds


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (("mixer=compressed", "mixer.top=20", "mixer.window=32"), 0.02),
        # Among so few tokens hashes of a new model are far from even: some tiles are wider.
        (("mixer=lsh", "mixer.chunk_size=32"), 0.1),
    ],
)
def test_the_planned_peak_is_the_measured_one(words, tolerance):
    words = ("engine=single", "model=decoder", "model.layers=1", *words)
    (step,) = ranks(1, measured, words)
    plan = plan_step(config_of(words), WORDS, 0, read_device("cpu"))
    assert plan.peak_bytes == pytest.approx(step.peak_bytes, rel=tolerance)


def test_a_rank_plans_the_chosen_blocks_that_it_has_at_hand():
    def plan(method):
        words = ("engine=single", "model=decoder", "mixer=compressed", "mixer.top=16")
        sizes = ("parallel.context=2", "context_length=1024", "batch_tokens=1024")
        config = config_of((*words, *sizes, f"parallel.method={method}", "model.layers=1"))
        return plan_step(config, WORDS, 1, read_device("cpu")).costs.flops

    # A ring asks for all chosen blocks at every rank, and finds those that are there.
    assert 0.5 < plan("ring") / plan("allgather") < 2


def test_groups_that_are_left_out_cost_as_those_beside_them():
    device = read_device("cpu")
    costs = StepCosts(device, "float32")

    plain = {name: getattr(readings, name) for name in ("visited", "widths_of", "has_numbers")}
    with expected_pairs(costs, device):
        for size in readings.visited(range(1, 101)):
            costs.flops += size
    assert costs.flops == pytest.approx(5050, rel=0.02)
    assert {name: getattr(readings, name) for name in plain} == plain


def test_whole_numbers_made_of_fake_ones_are_fake():
    with FakeArithmetic():
        numbers = torch.randn(8).long()
        assert type(numbers) is not torch.Tensor
        assert type(torch.arange(8) + 1) is torch.Tensor


def test_a_key_that_is_its_value_is_one_without_numbers_too():
    with FakeArithmetic():
        key = torch.randn(1, 4, 1, 8)
        assert chosen_pairs._same(key, key) and not chosen_pairs._same(key, key.clone())


def test_only_rows_count_that_are_read_or_written():
    costs = StepCosts(read_device("cpu"), "float32")
    table = torch.zeros(10_000, 64)
    index = torch.arange(10)
    rows = torch.zeros(10, 64)
    aten = torch.ops.aten
    costs.note(aten.index_select.default, (table, 0, index), rows, {})
    costs.note(aten.index_add_.default, (table, 0, index, rows), table, {})
    assert costs.total_seconds < table.nbytes / costs.device.memory_bandwidth
    before = costs.total_seconds
    costs.note(torch.ops.prim.device.default, (table,), None, {})
    costs.note(aten.empty_like.default, (table,), table, {})
    assert costs.total_seconds == before
