"""DeepSpeed, at every stage, trains what plain torch trains in one process, and its state is
everybody's state."""

import functools

import pytest
import torch
import torch.distributed.checkpoint as dcp

import parallel.engines.deepspeed
from parallel.engines.deepspeed import Deepspeed
from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from tests.support.small_model import CLIP, ENGINES, OPTIM, on_meta, plain_start, rows, train, truth

COUNT = 6  # rows a step: 1, 2 and 3 ranks and 2 micro-batches divide it
STEPS = 3
FLOAT = 2e-4  # AdamW divides tiny gradients by their size


def first(cases, numbers):
    """The cases, of which `make test` runs these; together they have every value of every axis."""
    return [
        case if number in numbers else pytest.param(*case, marks=pytest.mark.full)
        for number, case in enumerate(cases)
    ]


true_run = functools.cache(truth)


def engine_here(name, size, **settings):
    """As small.engine_here, in float32; zero0 to zero3 are DeepSpeed's stages."""
    parallel.engines.deepspeed.KEPT = 0  # no parameter is too small for ZeRO-3 to shard
    kind, own = (
        ENGINES.get(name, Deepspeed),
        {} if name in ENGINES else {"zero_stage": int(name[-1])},
    )
    engine = kind(
        build_mesh(1, size), OPTIM, **{"precision": "float32", "seed": 3, **own, **settings}
    )
    engine.wrap(on_meta())
    return engine


def everything(engine):
    """Every tensor of the state, gathered, by part and name."""
    return {
        part: {
            name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
            for name, t in tensors.items()
        }
        for part, tensors in engine.state().items()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys()
        and all(torch.equal(t, other[part][name]) for name, t in one[part].items())
        for part in one
    )


def trained(env, name, micro):
    engine = engine_here(name, env.size)
    norms = train(engine, 0, STEPS, COUNT, micro)
    return everything(engine)["model"], norms, [n for n, _ in engine.model.named_parameters()]


CASES = [
    ("zero0", 2, 1),
    *((f"zero{z}", 2, 2) for z in range(4)),
    *((f"zero{z}", 3, 1) for z in (1, 2, 3)),
]


@pytest.mark.parametrize("name, size, micro", first(CASES, (1, 3, 7)))
def test_three_clipped_steps_equal_the_one_process_run(name, size, micro):
    expected, expected_norms = true_run(STEPS, COUNT)
    assert min(expected_norms) > CLIP  # clipping is at work
    for parameters, norms, names in ranks(size, trained, name, micro):
        assert names == list(expected)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)
        for key, tensor in expected.items():
            torch.testing.assert_close(parameters[key].double(), tensor, rtol=0, atol=FLOAT)


def saved(env, name, path, settings):
    engine = engine_here(name, env.size, **settings)
    train(engine, 0, 2, COUNT, 1)
    dcp.save(engine.state(), checkpoint_id=path)
    before = everything(engine)
    return before, train(engine, 2, 4, COUNT, 1)


def resumed(env, name, path, settings):
    engine = engine_here(name, env.size, **{**settings, "seed": 4})
    train(engine, 7, 8, COUNT, 1)  # somewhere else, so that loading has something to do
    state = engine.state()
    dcp.load(state, checkpoint_id=path)
    engine.load(state)
    return everything(engine), train(engine, 2, 4, COUNT, 1)


WAYS = [
    ("zero1", 2, "fsdp", 3, "float32"),
    ("fsdp", 2, "zero3", 3, "float32"),
    ("zero3", 2, "single", 2, "float32"),
    ("single", 2, "zero2", 3, "float32"),
    ("zero3", 3, "zero1", 2, "float32"),
    ("zero0", 2, "zero2", 2, "float32"),
    ("zero1", 2, "fsdp", 2, "bfloat16"),
    ("zero2", 2, "zero3", 2, "bfloat16"),
]


@pytest.mark.parametrize("name, size, then, on, precision", first(WAYS, (0, 5, 7)))
def test_a_checkpoint_goes_on_in_another_engine_at_another_stage_on_other_ranks(
    name, size, then, on, precision, tmp_path
):
    settings = {"precision": precision}
    before, norms = ranks(size, saved, name, str(tmp_path), settings)[0]
    for after, norms_after in ranks(on, resumed, then, str(tmp_path), settings):
        assert equal(after, before)
        assert all(t == 2 for key, t in after["optimizer"].items() if key.endswith(".step"))
        torch.testing.assert_close(
            norms_after, norms, rtol=1e-5 if precision == "float32" else 0.02, atol=0
        )


def bfloat16(env, name):
    engine = engine_here(name, env.size, precision="bfloat16")
    first, blank = everything(engine)["model"], everything(engine)["optimizer"]
    norms = train(engine, 0, STEPS, COUNT, 2)
    return (
        first,
        blank,
        everything(engine)["model"],
        norms,
        engine.model(rows(0, 1)[0].tokens[None]).dtype,
    )


@pytest.mark.parametrize("name", [pytest.param("zero1", marks=pytest.mark.full), "zero2", "zero3"])
def test_bfloat16_computes_in_it_and_keeps_float32_from_the_first_weights_on(name):
    expected, expected_norms = true_run(STEPS, COUNT)
    single = ranks(2, bfloat16, "single")[0]
    for first, blank, parameters, norms, computed in ranks(2, bfloat16, name):
        assert computed == torch.bfloat16
        assert blank.keys() == single[1].keys() and not any(
            tensor.any() for tensor in blank.values()
        )
        for key, tensor in plain_start().float().named_parameters():
            assert torch.equal(first[key], tensor)
        torch.testing.assert_close(norms, expected_norms, rtol=0.05, atol=0)
        torch.testing.assert_close(norms[0], single[3][0], rtol=1e-5, atol=0)
        for key, tensor in expected.items():
            assert parameters[key].dtype == torch.float32
            torch.testing.assert_close(parameters[key].double(), tensor, rtol=0, atol=0.02)


def skipped(env, name, precision):
    """A step left out between two: the state around it, the norm it had, and the norm of the
    next."""
    engine = engine_here(name, env.size, precision=precision)
    train(engine, 0, 1, COUNT, 2)
    before = everything(engine)
    for row in rows(5, COUNT)[env.rank :: env.size]:
        engine.backward(engine.model(row.tokens[None]).float().sum() * float("nan"), last=False)
    engine.backward(engine.model(row.tokens[None]).float().sum())
    norm = engine.clip(CLIP)
    engine.skip()
    return before, everything(engine), norm, train(engine, 1, 2, COUNT, 2)


def unskipped(env, name, precision):
    return train(engine_here(name, env.size, precision=precision), 0, 2, COUNT, 2)[1:]


LEFT_OUT = [
    *((f"zero{z}", "float32") for z in range(4)),
    ("zero1", "bfloat16"),
    ("zero2", "bfloat16"),
]


@pytest.mark.parametrize("name, precision", first(LEFT_OUT, (1, 5)))
def test_a_step_left_out_leaves_no_trace(name, precision):
    expected = ranks(2, unskipped, name, precision)[0]
    for before, after, norm, norms in ranks(2, skipped, name, precision):
        assert equal(before, after)
        assert not norm < float("inf")
        assert norms == expected


def walked(env):
    model = engine_here("zero3", env.size).model
    return (
        [n for n, _ in model.named_modules()],
        [n for n, _ in model.named_parameters()],
        list(model.state_dict()),
    )


def test_what_is_called_walks_like_the_plain_model():
    plain = plain_start()
    modules, parameters, state = ranks(2, walked)[0]
    assert modules == [name for name, _ in plain.named_modules()]
    assert parameters == [name for name, _ in plain.named_parameters()] and state == list(
        plain.state_dict()
    )


def foreign(env):
    engine = engine_here("zero2", env.size)
    state = engine.state()
    state["model"]["norm.weight"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"norm.weight.*\[4\].*\[5\]"):
        engine.load(state)


def test_a_state_of_another_shape_is_refused():
    ranks(2, foreign)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"precision": "float64"}, "float64"),
        ({"precision": "bfloat16", "zero_stage": 0}, "engine.zero_stage=1"),
        ({"offload": "optimizer"}, "engine.offload=none"),
        ({"zero_stage": 3, "compile": True}, "engine.zero_stage=2"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_way_out(settings, words):
    ranks(2, refused, settings, words)


def refused(env, settings, words):
    with pytest.raises(ValueError, match=words):
        Deepspeed(build_mesh(1, env.size), OPTIM, **settings)


def test_it_needs_ranks():
    with pytest.raises(ValueError, match="engine=single"):
        Deepspeed(Mesh.alone(), OPTIM)
