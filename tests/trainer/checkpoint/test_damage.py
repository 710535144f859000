"""A full disk, a kill at any moment, a stranger's pickle: the last whole checkpoint survives and
nobody waits for ever."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.pool import ranks
from trainer.checkpoint import storage
from trainer.checkpoint.manifest import MANIFEST, digest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.writer import CheckpointWriter
from trainer.errors import BAD_RUN, UserError

ROOT = Path(__file__).parents[3]
KEPT = "step_00000001"


def state(value: float, size: int = 60_000) -> dict:
    return {"model": {f"w{index}": torch.full((size,), value) for index in range(4)}}


def fill(env, directory: str, asynchronous: bool, victim: int, number: int):
    """Save step 1, then step 2 on a disk that fails on one rank; then step 3 on a good one."""
    checkpoints = CheckpointWriter(directory, group=env.group, asynchronous=asynchronous)
    checkpoints.save(1, state(1.0), {})
    checkpoints.finish()
    before = storage.os.fsync

    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    message, code = "", 0
    try:
        storage.os.fsync = full if env.rank == victim else before
        checkpoints.save(2, state(2.0), {})
        while checkpoints.poll() is None:
            pass
    except UserError as fault:
        message, code = str(fault), fault.code
    finally:
        storage.os.fsync = before
    left = sorted(path.name for path in Path(directory).iterdir())
    checkpoints.save(3, state(3.0), {})
    checkpoints.close()
    return message, code, left


@pytest.mark.every_case
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_disk_full_on_one_rank_is_told_to_all_and_leaves_the_last_whole(
    tmp_path, asynchronous, victim
):
    answers = ranks(3, fill, str(tmp_path), asynchronous, victim, errno.ENOSPC)
    assert len({message for message, _, _ in answers}) == 1
    message, code, left = answers[0]
    assert (
        f"checkpoint of step 2 was not saved: the disk under {tmp_path} is full (rank {victim}:"
        in message
    )
    assert f"the last whole one is {KEPT}" in message
    assert code == BAD_RUN
    assert left == [KEPT]
    assert CheckpointReader(tmp_path).latest() == tmp_path / "step_00000003"


def test_another_trouble_of_the_disk_is_not_called_full(tmp_path):
    message, _, left = ranks(3, fill, str(tmp_path), False, 1, errno.EIO)[0]
    assert "could not be written (rank 1: Input/output error)" in message
    assert left == [KEPT]


def test_a_limit_of_the_file_size_is_a_full_disk_too(tmp_path):
    checkpoints = CheckpointWriter(tmp_path, say=lambda text: None)
    checkpoints.save(1, state(1.0), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="is full"):
            checkpoints.save(2, state(2.0), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [KEPT]


def test_a_directory_that_cannot_be_made_is_a_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the checkpoints in"):
        CheckpointWriter(tmp_path / "file" / "checkpoints")


SAVING = """
import sys, torch
from trainer.checkpoint.writer import CheckpointWriter
checkpoints = CheckpointWriter(sys.argv[1], keep=2, asynchronous=sys.argv[2] == "True")
print("ready", flush=True)
for step in range(1, 10**6):
    value = float(step)
    weights = {f"w{i}": torch.full((60_000,), value) for i in range(4)}
    checkpoints.save(step, {"model": weights}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_whole(tmp_path, asynchronous):
    chance = random.Random(5)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path / "run"), str(asynchronous)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    moments = 0
    try:
        while child.stdout.readline().strip() != "3":
            assert child.poll() is None
        # Each moment is a stop, a copy of the directory as it lies there (what a kill would leave),
        # and on.
        while moments < 12:
            time.sleep(chance.random() * 0.03)
            os.kill(child.pid, signal.SIGSTOP)
            os.waitpid(child.pid, os.WUNTRACED)
            moments += 1
            moment = tmp_path / f"moment_{moments}"
            shutil.copytree(tmp_path / "run", moment)
            os.kill(child.pid, signal.SIGCONT)
            check_whole(moment)
    finally:
        os.kill(child.pid, signal.SIGCONT)
        child.kill()
        child.wait()
    check_whole(tmp_path / "run")


def check_whole(directory: Path) -> None:
    """All tensors of the newest checkpoint are of its own step, and the one before it is whole
    too."""
    said = []
    checkpoints = CheckpointWriter(directory, say=said.append)
    latest = checkpoints.latest()
    assert latest is not None and said == []
    saved = checkpoints.load(latest, state(0.0))
    assert saved.extra == {"step": saved.step}
    for tensor in saved.state["model"].values():
        assert tensor.eq(saved.step).all()
    assert all(path.name.startswith("step_") for path in directory.iterdir())


class Trap:
    """A pickle that runs a command when it is opened."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


def test_nothing_of_a_strangers_checkpoint_is_unpickled(tmp_path, monkeypatch):
    checkpoints = CheckpointWriter(tmp_path / "run", say=lambda text: None)
    checkpoints.save(1, state(1.0), {})
    place, trap = tmp_path / "run" / KEPT, pickle.dumps(Trap(tmp_path / "sprung"))
    assert not any(b"ctorch" in path.read_bytes() for path in place.iterdir())
    shard, manifest = place / "shard_00000.safetensors", json.loads((place / MANIFEST).read_text())
    (place / ".metadata").write_bytes(trap)
    raw = trap + shard.read_bytes()[len(trap) :]
    shard.write_bytes(raw)
    manifest["files"][shard.name]["sha256"] = hashlib.sha256(raw).hexdigest()
    manifest["sha256"] = digest(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest))
    for module, name in (
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(
            module, name, lambda *args, **settings: pytest.fail("something was unpickled")
        )
    assert checkpoints.load(place, state(0.0)).state["model"]["w3"].eq(1.0).all()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda m: m["files"].update({"../../secret": {"bytes": 1, "sha256": ""}}), "is no shard"),
        (lambda m: m["tensors"]["model/w0"]["chunks"][0].update(start=-64), "outside of"),
        (lambda m: m["tensors"]["model/w0"]["chunks"][0].update(start=10**9), "outside of"),
        (lambda m: m["tensors"]["model/w0"].pop("dtype"), "lacks an entry"),
        (lambda m: m.update(version=2), "format 2"),
    ],
)
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path, spoil, told):
    checkpoints = CheckpointWriter(tmp_path, say=lambda text: None)
    checkpoints.save(1, state(1.0), {})
    manifest = json.loads((tmp_path / KEPT / MANIFEST).read_text())
    spoil(manifest)
    manifest["sha256"] = digest(manifest)
    (tmp_path / KEPT / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=told):
        checkpoints.load(tmp_path / KEPT, state(0.0))
