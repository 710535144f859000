"""The RMS norm of a CPU is torch's, keeps less for backward, and stands back where it must."""

import pytest
import torch
from torch.nn import functional as F

from models.norms import RMSNorm, rms_norm
from models.positions.rope import Rope
from models.span import Span

WIDTH = 12
SHAPES = [(3, 40, WIDTH), (WIDTH,), (1, 0, WIDTH)]


def drawn(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def norm(dtype=torch.float64, eps=None):
    made = RMSNorm(WIDTH, eps=eps, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(drawn((WIDTH,)))
    return made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [None, 1e-2])
def test_the_norm_and_its_gradients_are_torchs(shape, eps):
    layer = norm(eps=eps)
    ours = drawn(shape).requires_grad_()
    theirs = drawn(shape).requires_grad_()
    grad = drawn(shape).flip(-1)
    got = layer(ours)
    weight = layer.weight.detach().requires_grad_()
    expected = F.rms_norm(theirs, (WIDTH,), weight, eps)
    got.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_norm_without_a_gain_is_torchs(shape, dtype):
    ours = drawn(shape, dtype).requires_grad_()
    theirs = drawn(shape, dtype).requires_grad_()
    grad = drawn(shape, dtype).flip(-1)
    got = rms_norm(ours, 1e-2)
    expected = F.rms_norm(theirs, (WIDTH,), eps=1e-2)
    got.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)


def test_tokens_that_do_not_follow_each_other_in_memory():
    whole = drawn((4, 3, 2 * WIDTH)).requires_grad_()
    layer = norm()
    scattered = layer(whole.transpose(0, 1)[..., ::2])
    (got,) = torch.autograd.grad(scattered.square().sum(), whole)
    contiguous = F.rms_norm(whole.transpose(0, 1)[..., ::2].contiguous(), (WIDTH,), layer.weight)
    (expected,) = torch.autograd.grad(contiguous.square().sum(), whole)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_a_token_of_zeros_has_a_gradient_and_no_nan():
    x = torch.zeros(1, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    layer = norm(eps=1e-6)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0, 0], layer.weight.detach() * 1e3)


def kept_bytes(compute, *inputs):
    """Bytes that autograd keeps beside the inputs."""
    own = {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = compute(*inputs)
    own.add(out.untyped_storage().data_ptr())
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def test_backward_keeps_one_number_a_token():
    x = drawn((2, 50, WIDTH)).requires_grad_()
    layer = norm()
    assert kept_bytes(lambda x, _: layer(x), x, layer.weight) == 8 * 100


def test_a_rotation_keeps_positions_and_no_cosines():
    span = Span.line(2, 50)
    x = drawn((2, 50, 3, 8)).requires_grad_()
    rotate = Rope().rotate
    # The inverse frequencies alone; what the span holds is kept anyway.
    assert kept_bytes(lambda x, _: rotate(x, span), x, span.pos) == 8 * 4
    assert torch.autograd.gradcheck(lambda x: rotate(x, span), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_left_to_torch(dtype):
    x = drawn((2, 5, WIDTH), dtype)
    layer = norm(dtype)
    assert torch.equal(layer(x), F.rms_norm(x, (WIDTH,), layer.weight, None))
    mixed = norm(torch.float32)
    assert torch.equal(mixed(x), F.rms_norm(x, (WIDTH,), mixed.weight, None))
