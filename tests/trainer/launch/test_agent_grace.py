"""The agent gives its ranks the same time to save under every version of torch."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing.api import PContext

from trainer.launch import agent_grace


class Closed(PContext):
    """A context of ranks that notes how it is closed."""

    _start = _poll = _close = pids = None  # what the base class leaves to others

    def __init__(self):
        self.told, self._tail_logs, self.filtered_stdout, self.filtered_stderr = [], [], None, None
        self._close = lambda **words: self.told.append((words["death_sig"], words["timeout"]))


@pytest.fixture(params=[agent_grace.GRACE, "a setting that no version has"])
def name(request, monkeypatch):
    monkeypatch.setattr(agent_grace, "GRACE", request.param)


@pytest.mark.usefixtures("name")
def test_ranks_have_the_grace_that_was_asked_for_and_nobody_else_does():
    ranks = Closed()
    with agent_grace.agent_config(77, min_nodes=1, max_nodes=1, nproc_per_node=2) as config:
        close = [signal.SIGTERM]  # what the agent of each version calls it with
        if (seconds := getattr(config, agent_grace.GRACE, None)) is not None:
            close.append(seconds)
        ranks.close(*close)
    ranks.close(signal.SIGTERM)
    assert ranks.told == [(signal.SIGTERM, 77), (signal.SIGTERM, 30)]
