"""The reader of .wandb files takes those that are still being written."""

from wandb.proto import wandb_internal_pb2

from tests.support import wandb_file


def record(step):
    made = wandb_internal_pb2.Record()
    item = made.history.item.add()
    item.key = "step"
    item.value_json = str(step)
    return made.SerializeToString()


def test_a_record_that_is_not_all_there_is_left_for_later(tmp_path):
    raw = b":W&B\0\0\0"
    ends = []
    for step in (100, 200, 300):
        raw += wandb_file.HEADER.pack(0, len(record(step)), 1) + record(step)
        ends.append(len(raw))
    path = tmp_path / "run.wandb"
    for size in range(7, len(raw) + 1):
        path.write_bytes(raw[:size])
        steps = [each["step"] for each in wandb_file.read(path).history]
        assert steps == [100, 200, 300][: sum(end <= size for end in ends)]
