"""What no rank of the run has signed is never opened, whatever it is."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.support.pool import Env, ranks
from trainer.errors import UserError
from trainer.launch.nodes import NoMeeting
from trainer.launch.signed_objects import sign_objects
from trainer.secret import NAME, shared_secret


class Trap:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def signed(monkeypatch):
    """Sign with one secret, as long as the test lasts."""
    monkeypatch.setattr(distributed_c10d, "_pickler", distributed_c10d._pickler)
    monkeypatch.setattr(distributed_c10d, "_unpickler", distributed_c10d._unpickler)
    sign_objects("secret")


def sent(value: object) -> tuple[torch.Tensor, int]:
    tensor, size = distributed_c10d._object_to_tensor(value, torch.device("cpu"), None)
    return tensor, int(size)


def test_an_object_of_this_run_arrives_and_one_of_a_stranger_is_not_opened(signed, tmp_path):
    value = {"step": 3, "names": ["a", None]}
    assert distributed_c10d._tensor_to_object(*sent(value), None) == value
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for raw in (trap, bytes(32) + trap, b""):
        with pytest.raises(NoMeeting, match="no rank of this run has signed"):
            distributed_c10d._tensor_to_object(
                torch.frombuffer(bytearray(raw + b" "), dtype=torch.uint8), len(raw), None
            )
    tensor, size = sent(value)
    sign_objects("another secret")
    with pytest.raises(NoMeeting):
        distributed_c10d._tensor_to_object(tensor, size, None)
    assert not (tmp_path / "sprung").exists()


def gathered(env: Env) -> None:
    before = distributed_c10d._pickler, distributed_c10d._unpickler
    try:
        sign_objects("of all ranks")
        values: list = [None] * env.size
        dist.all_gather_object(values, {"rank": env.rank})
        assert values == [{"rank": rank} for rank in range(env.size)]
        box = ["of rank 0" if env.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        assert box == ["of rank 0"]
    finally:
        distributed_c10d._pickler, distributed_c10d._unpickler = before


def test_ranks_exchange_signed_objects():
    ranks(2, gathered)


def test_a_run_directory_has_one_secret_for_its_owner_alone(tmp_path):
    secret = shared_secret(tmp_path)
    assert len(secret) == 64 and shared_secret(tmp_path) == secret
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    (tmp_path / "other").mkdir()
    assert shared_secret(tmp_path / "other") != secret
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / NAME).symlink_to(tmp_path / NAME)
    with pytest.raises(UserError, match="remove that file, or choose another run_dir"):
        shared_secret(tmp_path / "linked")
