"""python -m trainer KEY=VALUE ...: compose and check once, then start the ranks; or be one of them.

the command        compose -> check -> run directory -> ranks (trainer/launch/elastic.py) -> exit status
launch=slurm       the command is handed to a batch job, which gives it on each of its machines (trainer/launch/slurm.py)
with -m            every combination of settings is such a command of its own (trainer/sweep/sweep.py)
each rank          read the directory's config.yaml -> join the others -> trainer/run.py
under torchrun, srun, mpirun or deepspeed (trainer/launch/starters.py)
                   every process is a rank already: rank 0 checks and makes the directory, the
                       others are told
"""

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer import run_dir
from trainer.config.help import text
from trainer.config.overrides import MULTIRUN_WORDS
from trainer.config.schema import Config
from trainer.entry import asks_for_help, run_command
from trainer.errors import BAD_RUN, BUG, DONE, UserError
from trainer.launch import elastic, exit_report, slurm, starters
from trainer.launch.nodes import NoMeeting
from trainer.launch.parent_death import die_with_parent
from trainer.logs.streams import plain
from trainer.preflight import prepare
from trainer.secret import shared_secret
from trainer.sweep.batch import JOB_OF
from trainer.sweep.sweep import run_sweep

RANK_OF = "--rank-of"  # hidden: RUN_DIR, then the launcher's process number
ONE_A_MACHINE = (
    "launch=multinode",
    "launch.name=multinode",
)  # srun may start one launcher on each machine
# under torchrun: keys of the store that the ranks meet at
WISH = "wish"
HEARD = "heard"
RUN = "trainer.run"  # imported in the ranks alone, so that a wish is refused quickly


def main(words: Sequence[str]) -> int:
    """Do what the command line says; returns the exit status."""
    try:
        if words[:1] == [RANK_OF]:
            return as_rank(Path(words[1]), int(words[2]))
        if asks_for_help(words):
            print(text())
            return DONE
        if words[:1] == [slurm.IN_JOB]:
            number = int(words[1])
            endpoint = words[2]
            return command(words[3:], lambda config: slurm.here(config, number, endpoint))
        if words[:1] == [JOB_OF]:
            die_with_parent(int(words[1]))
            return command(
                words[2:], dropped=lambda found: None
            )  # the sweep has said which settings reach nothing in this job
        start = None if any(word in ONE_A_MACHINE for word in words) else _started()
        if any(word in MULTIRUN_WORDS for word in words):
            return many(words, start)
        return (
            command(words)
            if start is None
            else within(starters.without_local_rank(list(words)), start)
        )
    except UserError as fault:
        if str(fault):
            print(plain(str(fault)), file=sys.stderr)
        return fault.code
    except KeyboardInterrupt:
        return exit_report.SAVED[signal.SIGINT]


def _started() -> starters.Start | None:
    """How this process was started together with others; None = alone."""
    try:
        return starters.started()
    except starters.Incomplete as error:
        raise UserError(str(error)) from error


def many(words: Sequence[str], start: starters.Start | None) -> int:
    """Run a sweep; it starts its own ranks, a launch for each job."""
    if start is not None:
        raise UserError(
            f"-m starts the ranks of every job itself; leave {start.starter} out"
            if start.rank == 0
            else ""
        )
    return run_sweep(words)


def command(
    words: Sequence[str],
    here: Callable[[Config], Config] | None = None,
    dropped: Callable[[dict[str, str]], None] | None = None,
) -> int:
    """Check, then start the ranks and wait for them; `here` and `dropped`: see prepare.wish."""
    config = prepare.load_config(words, here=here, dropped=dropped)
    if config.launch.name == "slurm":
        return job(config, words)
    arguments = ["-u", "-m", "trainer", RANK_OF]
    if config.launch.dry_run:
        print(prepare.dry_run(config, [*arguments, "RUN_DIR", "LAUNCHER"]))
        return DONE
    config, path = prepare.create_run_dir(config)
    wish = config.launch
    nodes = prepare.rendezvous_of(config, path)
    with ExitStack() as held:
        if (
            not wish.node_rank
        ):  # of several machines the first does it for all; the others' ranks start after its own
            held.enter_context(run_dir.lock(path))
            prepare.write_record(config, path)
        end = elastic.start_ranks(
            [*arguments, str(path), str(os.getpid())],
            ranks=config.parallel.ranks // wish.nodes,
            scratch=path / f"{run_dir.SCRATCH}{wish.node_rank or ''}",
            max_restarts=wish.max_restarts,
            grace_s=wish.grace_s,
            nodes=nodes,
        )
    if end.message:
        print(plain(end.message), file=sys.stderr)
    return end.code


def job(config: Config, words: Sequence[str]) -> int:
    """Hand the run to Slurm, and do not wait for it."""
    if config.launch.dry_run:
        path = Path(config.run_dir) if config.run_dir else run_dir.fresh_path(config.name)
        print(
            f"{slurm.script(config, path.resolve(), words)}\n# nothing was submitted"
            " (launch.dry_run=true)"
        )
    else:
        config, path = prepare.create_run_dir(config)
        print(slurm.submit(config, path, words))
    return DONE


def as_rank(path: Path, launcher: int) -> int:
    """Be a rank of the run in `path`; whatever ends it is told to the launcher, which shows it
    once."""
    die_with_parent(launcher)
    if elastic.already_finished():
        return DONE  # an earlier attempt ended in order, and the launcher knows how
    try:
        config = run_dir.read_config(path)
        with run_dir.presence(path):
            ranks = elastic.init_process_group(config.launch.timeout_s)
            return elastic.report_exit(run(config, ranks, path))
    except UserError as fault:
        return confess(fault, fault.code, fault.again)
    except NoMeeting as error:
        return confess(error, BAD_RUN)
    except BaseException as error:  # a bug, told with its traceback
        return confess(error, None)


def run(config: Config, ranks: elastic.RankInfo, path: Path) -> int:
    """The run itself. The group is taken down only at an orderly end, or living ranks would wait
    for dead ones."""
    code = importlib.import_module(RUN).run(config, ranks, path)
    dist.destroy_process_group()
    return code


def confess(error: BaseException, code: int | None, again: bool = False) -> int:
    """End a rank that failed, at once: whatever hangs in the background hangs on a peer that will
    not answer."""
    elastic.report_failure(error, code, again=again)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(BUG if code is None else code)


def within(words: Sequence[str], start: starters.Start) -> int:
    """Be a rank that somebody else started. Rank 0 settles the wish before the group exists, for
    the wish sets its timeout."""
    die_with_parent(os.getppid())
    try:
        starters.adopt(start)
        store = elastic.rendezvous_store()
    except starters.Incomplete as error:
        raise UserError(str(error) if start.rank == 0 else "") from error
    except NoMeeting as error:
        raise UserError(str(error), BAD_RUN) from error
    with ExitStack() as held:
        if start.rank == 0:
            store.set(WISH, json.dumps(_settled(words, start, held)))
        told = json.loads(store.get(WISH))
        if "fault" in told:
            store.add(HEARD, 1)
            while (
                start.rank == 0 and store.add(HEARD, 0) < start.size
            ):  # the store may live in this process
                time.sleep(0.05)
            raise UserError(told["fault"] if start.rank == 0 else "", told["code"])
        config = Config.model_validate(told["config"])
        path = Path(told["path"])
        held.enter_context(run_dir.presence(path))
        os.environ[elastic.SECRET] = shared_secret(path)
        try:
            return run(config, elastic.init_process_group(config.launch.timeout_s, store), path)
        except BaseException as error:
            elastic.report_failure(error, error.code if isinstance(error, UserError) else None)
            raise


def _settled(words: Sequence[str], start: starters.Start, held: ExitStack) -> dict[str, Any]:
    """What rank 0 tells the others: the config and its directory, which is locked while `held`
    lasts; or a fault."""
    try:
        config, path = prepare.create_run_dir(
            prepare.load_config(words, started=start.size, starter=start.starter)
        )
        held.enter_context(run_dir.lock(path))
        prepare.write_record(config, path)
    except UserError as fault:
        return {"fault": str(fault), "code": fault.code}
    return {"config": run_dir.plain_config(config), "path": str(path)}


if __name__ == "__main__":
    run_command(main)
