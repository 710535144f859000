"""A process that somebody else started together with others is recognised by the variables of its
starter."""

import os

import pytest

from trainer.launch import elastic
from trainer.launch.nodes import Nodes, NoMeeting, interface_of, loopback
from trainer.launch.starters import Incomplete, Start, adopt, started, without_local_rank

PLACES = (
    "RANK",
    "SIZE",
    "WORLD",
    "PROCID",
    "LOCALID",
    "NTASKS",
    "MASTER",
    "STEP",
    "NPROCS",
    "PMI",
    "NODEID",
    "LOCALNRANKS",
)


@pytest.fixture
def variables(monkeypatch):
    """Start from an environment in which nobody started anything."""
    monkeypatch.setattr(
        os,
        "environ",
        {key: value for key, value in os.environ.items() if not any(p in key for p in PLACES)},
    )
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    os.environ.pop("ENVIRONMENT", None)
    return lambda **given: os.environ.update({key: str(value) for key, value in given.items()})


OMPI = {"OMPI_COMM_WORLD_LOCAL_RANK": 1, "OMPI_COMM_WORLD_LOCAL_SIZE": 2}


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({}, None),
        (
            {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1},
            Start("a launcher that sets RANK and WORLD_SIZE", 5, 8, 1, None),
        ),
        ({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}, None),
        ({"RANK": 0}, None),
        ({"SLURM_PROCID": 3, "SLURM_NTASKS": 4, "SLURM_LOCALID": 1}, Start("srun", 3, 4, 1, None)),
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 4, "ENVIRONMENT": "BATCH"}, None),
        (
            {
                "SLURM_PROCID": 1,
                "SLURM_NTASKS": 8,
                "SLURM_STEP_NUM_TASKS": 2,
                "SLURM_STEP_ID": 0,
                "ENVIRONMENT": "BATCH",
            },
            Start("srun", 1, 2, None, None),
        ),
        (
            {"SLURM_PROCID": 0, "SLURM_NTASKS": 8, "SLURM_STEP_NUM_TASKS": 1, "SLURM_STEP_ID": 0},
            None,
        ),
        (
            {"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 4, **OMPI},
            Start("mpirun", 3, 4, 1, 2),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": 3,
                "OMPI_COMM_WORLD_SIZE": 4,
                "SLURM_PROCID": 0,
                "SLURM_NTASKS": 9,
                **OMPI,
            },
            Start("mpirun", 3, 4, 1, 2),
        ),
        ({"PMI_RANK": 1, "PMI_SIZE": 2}, Start("mpirun", 1, 2, None, None)),
        (
            {
                "TORCHELASTIC_RUN_ID": "x",
                "RANK": 0,
                "WORLD_SIZE": 1,
                "LOCAL_RANK": 0,
                "LOCAL_WORLD_SIZE": 1,
            },
            Start("torchrun", 0, 1, 0, 1),
        ),
    ],
)
def test_each_starter_is_recognised_and_one_process_alone_is_none(variables, given, start):
    variables(**given)
    assert started() == start


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2: WORLD_SIZE=2, so the last rank is 1"),
        ({"RANK": "x", "WORLD_SIZE": 2}, "RANK=x: a whole number"),
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": "many"}, "SLURM_NTASKS=many: a whole number"),
    ],
)
def test_variables_that_contradict_each_other_are_a_message(variables, given, message):
    variables(**given)
    with pytest.raises(Incomplete, match=message):
        started()


def test_without_a_place_to_meet_the_start_is_refused_and_the_way_out_said(variables):
    variables(MASTER_ADDR="node0")
    with pytest.raises(
        Incomplete,
        match=r"srun started 4 processes, but MASTER_ADDR and MASTER_PORT .* launch=multinode",
    ):
        adopt(Start("srun", 1, 4, 0, None))
    variables(MASTER_PORT="29500")
    adopt(Start("srun", 1, 4, 0, None))
    assert (
        elastic.rank_and_size() == (1, 4)
        and os.environ["LOCAL_RANK"] == "0"
        and "LOCAL_WORLD_SIZE" not in os.environ
    )


def test_a_command_that_starts_its_own_ranks_is_refused_among_several(variables, tmp_path):
    variables(OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2)
    end = elastic.start_ranks(["-c", "raise SystemExit(7)"], ranks=1, scratch=tmp_path / "scratch")
    assert (
        end.code == 2
        and end.message.startswith("mpirun started 2 processes")
        and not (tmp_path / "scratch").exists()
    )


def test_the_word_that_deepspeed_adds_is_taken_out():
    assert without_local_rank(["--local_rank=3", "steps=2", "--local-rank=0"]) == ["steps=2"]


def test_ranks_whose_starter_does_not_tell_their_machine_are_counted_by_its_name(
    variables, monkeypatch
):
    class Store(dict):
        set = dict.__setitem__

        def get(self, key):
            return self[key].encode()

    store = Store(
        {"machine_of/0": "a", "machine_of/1": "b", "machine_of/3": "b", "machine_of/4": "c"}
    )
    monkeypatch.setattr("platform.node", lambda: "b")
    variables(RANK=2, WORLD_SIZE=5)
    assert elastic._local_place(store) == (1, 3)
    assert os.environ["LOCAL_RANK"] == "1" and os.environ["LOCAL_WORLD_SIZE"] == "3"


def test_on_one_machine_the_users_networks_do_not_count_and_on_several_they_do(variables):
    variables(GLOO_SOCKET_IFNAME="eth7", NCCL_SOCKET_IFNAME="eth7")
    elastic.bind_transport("127.0.0.1")
    assert (
        os.environ["GLOO_SOCKET_IFNAME"] == interface_of("127.0.0.1")
        and "eth7" not in os.environ["NCCL_SOCKET_IFNAME"]
    )
    with pytest.raises(
        NoMeeting,
        match=r"launch.address=192.0.2.77: this machine has no network interface with that",
    ):
        elastic.bind_transport("192.0.2.77")


def test_an_endpoint_that_no_other_machine_reaches_is_refused(monkeypatch):
    monkeypatch.setattr(
        "trainer.launch.nodes.resolved", lambda host: {"node0": "127.0.1.1", "10.0.0.5": host}[host]
    )
    nodes = Nodes(2, 0, "node0:29500", None, "run", 60)
    with pytest.raises(
        NoMeeting,
        match=r"launch.rdzv_endpoint=node0:29500: node0 is 127.0.1.1 .* give launch.address",
    ):
        nodes.listening_address()
    assert Nodes(2, 0, "node0:29500", "10.0.0.5", "run", 60).listening_address() == "10.0.0.5"
    assert loopback("127.3.4.5") and loopback("::1") and not loopback("10.0.0.5")
