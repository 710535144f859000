"""What is sent to the next rank arrives in its shapes, in as few messages as its dtypes allow."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import Communicator
from tests.support.pool import ranks


def drawn(rank, dtypes):
    """Parts of tensors of a rank, which do not follow each other in memory, and an empty one."""
    tensors = []
    for number, dtype in enumerate(dtypes):
        whole = torch.arange(2 * 7 * (3 + number)).reshape(2, 7, 3 + number) + 100 * rank
        tensors.append(whole.to(dtype)[:, 2:5])
    return [*tensors, torch.empty(2, 0, 3, dtype=dtypes[0])]


def shifted(env, dtypes):
    communicator = Communicator(env.group)
    with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as started:
        received = communicator.ring_shift(drawn(env.rank, dtypes), "keys").wait()
    (messages,) = started.call_args.args
    return received, len(messages) // 2, dict(communicator.bytes_sent)


@pytest.mark.parametrize(
    ("dtypes", "messages"),
    [
        ([torch.float32], 1),
        ([torch.float64, torch.float64, torch.float64], 1),
        ([torch.float32, torch.int64], 2),
    ],
)
def test_tensors_of_one_dtype_travel_as_one_message(dtypes, messages):
    for rank, (received, count, bytes_sent) in enumerate(ranks(3, shifted, dtypes)):
        expected = drawn((rank - 1) % 3, dtypes)
        assert [x.dtype for x in received] == [x.dtype for x in expected]
        for got, sent in zip(received, expected, strict=True):
            assert torch.equal(got, sent)
        assert count == messages
        assert bytes_sent == {"keys": sum(x.numel() * x.element_size() for x in expected)}
