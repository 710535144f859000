"""log.profile traces the steps that it names, on the ranks that it names, for Perfetto."""

import json
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from tests.support.pool import ranks
from tests.trainer.test_stages import SMALL, config_of, faults_of, in_rank
from trainer.logs.jsonl import METRICS, read
from trainer.logs.profile import WAIT, exposed_seconds
from trainer.run_dir import make_run_dir, record
from trainer.verify.whole_runs import write_documents


def test_chosen_steps_are_traced_on_chosen_ranks(tmp_path):
    directory = tmp_path / "run"
    words = [
        *SMALL,
        "data=files",
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
        "context_length=30",
        "batch_tokens=60",
        "steps=3",
        "evaluation.every=0",
        "parallel.context=2",
        "engine=fsdp",
        "log.profile.steps=[2,3]",
        "log.profile.ranks=[1]",
        "log.profile.memory=true",
        f"run_dir={directory}",
    ]
    make_run_dir(directory)
    record(directory, config_of(words))
    assert ranks(2, in_rank, words, str(directory), None) == [0, 0]
    assert [row["step"] for row in read(directory / METRICS)] == [1, 2, 3]
    traces = sorted((directory / "profile").iterdir())
    assert [trace.name for trace in traces] == [
        "step_00000002_rank_1.json",
        "step_00000003_rank_1.json",
    ]
    # What Perfetto and chrome://tracing take: complete events with a beginning and a duration.
    events = json.loads(traces[0].read_text())["traceEvents"]
    operators = {event["name"] for event in events if event.get("ph") == "X" and "dur" in event}
    assert {"aten::linear", "aten::mm"} & operators
    assert any(name.startswith("autograd::engine") for name in operators)
    assert any(event["name"] == "[memory]" for event in events)
    # Rank 1 waits for rank 0: in the ring, and for weights and gradients.
    assert WAIT in operators


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ("log.profile.steps=[3,900]",),
            "log.profile.steps=[3,900]: the run has 100 steps; name steps from 1 on",
        ),
        (
            ("log.profile.steps=[3]", "log.profile.ranks=[0,2]", "parallel.context=2"),
            "log.profile.ranks=[0,2]: the run has 2 ranks; name ranks from 0 to 1",
        ),
        (
            ("log.profile.memory=true",),
            "log.profile.memory=true: there are no steps to profile; name some in"
            " log.profile.steps, as [3,4]",
        ),
    ],
)
def test_steps_and_ranks_that_a_run_has_not_are_one_message(words, message):
    assert faults_of(*words) == [message]


def _event(name, start, end, device=DeviceType.CPU):
    return SimpleNamespace(
        name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end)
    )


def test_exposed_communication_is_that_beside_which_nothing_is_computed():
    waits = [_event(WAIT, 0, 2e6), _event("aten::mm", 2e6, 9e6), _event(WAIT, 9e6, 10e6)]
    assert exposed_seconds(waits, on_gpu=False) == pytest.approx(3)
    gpu = DeviceType.CUDA
    kernels = [
        _event("ncclDevKernel_SendRecv", 0, 5e6, gpu),
        _event("flash_fwd_kernel", 1e6, 3e6, gpu),
        _event("ncclDevKernel_AllGather_RING_LL", 4e6, 6e6, gpu),
        _event(WAIT, 0, 9e6),
    ]
    assert exposed_seconds(kernels, on_gpu=True) == pytest.approx(4)
