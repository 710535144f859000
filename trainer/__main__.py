"""The command `python -m trainer KEY=VALUE ...`: composes and checks once, then starts the ranks.

the command        compose -> check -> run directory -> ranks (trainer/launch/elastic.py) -> status
launch=slurm       a batch job gives the command on each of its machines (trainer/launch/slurm.py)
with -m            every combination of settings is a command of its own (trainer/sweep/sweep.py)
each rank          read the directory's config.yaml -> join the others -> trainer/stages.py
under torchrun, srun, mpirun or deepspeed (trainer/launch/starters.py)
                   every process is a rank already: rank 0 checks and makes the directory, and
                   tells the others
"""

import longspan.at_start  # noqa: F401

# isort: split
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from trainer import run_dir
from trainer.checkpoint.stage_state import present_stage
from trainer.config.help import text
from trainer.config.overrides import MULTIRUN_WORDS
from trainer.config.schema import Config
from trainer.config.stages import plan_of
from trainer.entry import asks_for_help, run_command
from trainer.errors import BAD_RUN, BUG, DONE, UserError
from trainer.launch import elastic, exit_report, slurm, starters
from trainer.launch.nodes import NoMeeting
from trainer.launch.parent_death import die_with_parent
from trainer.logs.streams import plain
from trainer.preflight import prepare
from trainer.secret import shared_secret
from trainer.sweep.batch import JOB_OF, PARENT
from trainer.sweep.sweep import run_sweep
from trainer.version import version_line

VERSION_WORD = "--version"
RANK_OF = "--rank-of"  # hidden: RUN_DIR, then the launcher's process number
RANK_COMMAND = ("-u", "-m", "trainer", RANK_OF)  # of the interpreter, and two words more
# srun may start one launcher on each machine, which is no rank itself.
MULTINODE_WORDS = ("launch=multinode", "launch.name=multinode")
# Keys of the store at which ranks meet that another launcher started.
DECISION_KEY = "wish"
HEARD_KEY = "heard"
# Imported by name in the ranks alone: its imports take seconds, and a refusal should be quick.
RUN_MODULE = "trainer.stages"


def main(words: Sequence[str]) -> int:
    """Does what the command line says; returns the exit status."""
    try:
        return _dispatch(words)
    except UserError as error:
        # Ranks other than 0 end with an empty message, so that it is shown once.
        if str(error):
            print(plain(str(error)), file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return exit_report.SAVED[signal.SIGINT]


def _dispatch(words: Sequence[str]) -> int:
    first_word = words[0] if words else ""
    if first_word == RANK_OF:
        return as_rank(Path(words[1]), int(words[2]))
    if asks_for_help(words):
        print(text(words))
        return DONE
    if first_word == VERSION_WORD:
        print(version_line())
        return DONE
    if first_word == slurm.IN_JOB:
        node = int(words[1])
        endpoint = words[2]
        # All was checked when the job was submitted; a job of a sweep may have settings that reach
        # no part of its model.
        return command(
            words[3:], lambda config: slurm.here(config, node, endpoint), lambda settings: None
        )
    if first_word == JOB_OF:
        die_with_parent(os.getppid() if words[1] == PARENT else int(words[1]))
        # The sweep has reported the settings that reach no part of this job's model.
        return command(words[2:], dropped=lambda settings: None)
    start = None
    if not any(word in MULTINODE_WORDS for word in words):
        start = _started()
    if any(word in MULTIRUN_WORDS for word in words):
        return many(words, start)
    if start is None:
        return command(words)
    return within(starters.without_local_rank(list(words)), start)


def _started() -> starters.Start | None:
    """Returns the place of this process among those that another launcher started, if one did."""
    try:
        return starters.started()
    except starters.Incomplete as error:
        raise UserError(str(error)) from error


def many(words: Sequence[str], start: starters.Start | None) -> int:
    """Runs a sweep, which starts the ranks of each of its jobs itself."""
    if start is not None:
        message = f"-m starts the ranks of every job itself; leave {start.starter} out"
        raise UserError(message if start.rank == 0 else "")
    return run_sweep(words)


def command(
    words: Sequence[str],
    here: Callable[[Config], Config] | None = None,
    dropped: Callable[[dict[str, str]], None] | None = None,
) -> int:
    """Checks the settings, starts the ranks and waits for them; returns the exit status.

    Args:
        words: KEY=VALUE settings.
        here: see prepare.load_config.
        dropped: see prepare.load_config.
    """
    config = prepare.load_config(words, here=here, dropped=dropped)
    if config.launch.name == "slurm":
        return job(plan_of(config)[0].config, words)
    if config.launch.dry_run:
        print(prepare.dry_run(config, [*RANK_COMMAND, "RUN_DIR", "LAUNCHER"]))
        return DONE
    report, _ = launch_run(config)
    if report.message:
        print(plain(report.message), file=sys.stderr)
    return report.code


def launch_run(config: Config) -> tuple[exit_report.ExitReport, Path]:
    """Starts the ranks of this machine and waits for them.

    Args:
        config: checked.

    Returns:
        The report of the last ranks, and the run directory.
    """
    config, path = prepare.create_run_dir(config)
    with ExitStack() as stack:
        # The first of several machines does this for all; their ranks start after its own.
        if not config.launch.node_rank:
            stack.enter_context(run_dir.lock(path))
            prepare.write_record(config, path)
        report = start_stages(config, path, [*RANK_COMMAND, str(path), str(os.getpid())])
    return report, path


def start_stages(config: Config, path: Path, command: Sequence[str]) -> exit_report.ExitReport:
    """Starts ranks, and others where a later stage takes another number; returns the last report.

    Args:
        config: of the whole run.
        path: its directory.
        command: arguments of the interpreter, the same for all ranks.
    """
    launch = config.launch
    stage = present_stage(config, path)
    while True:
        report = elastic.start_ranks(
            command,
            ranks=stage.config.parallel.ranks // launch.nodes,
            scratch=path / f"{run_dir.SCRATCH}{launch.node_rank or ''}",
            max_restarts=launch.max_restarts,
            grace_s=launch.grace_s,
            nodes=prepare.rendezvous_of(config, path),
            say=prepare.console_of(config).say,
        )
        started = stage.config.parallel.ranks
        stage = present_stage(config, path)
        # The ranks went on through all stages that take as many, so these were other ones.
        if report.code != DONE or stage.config.parallel.ranks == started:
            return report


def job(config: Config, words: Sequence[str]) -> int:
    """Hands the run to Slurm, and does not wait for it."""
    if config.launch.dry_run:
        path = Path(config.run_dir) if config.run_dir else run_dir.fresh_path(config.name)
        script = slurm.script(config, path.resolve(), words)
        print(f"{script}\n# nothing was submitted (launch.dry_run=true)")
    else:
        config, path = prepare.create_run_dir(config)
        print(slurm.submit(config, path, words))
    return DONE


def as_rank(path: Path, launcher: int) -> int:
    """Runs one rank of the run in `path`; an error is reported to the launcher, which shows it."""
    die_with_parent(launcher)
    if elastic.already_finished():
        return DONE  # an earlier attempt came to an orderly end, which the launcher knows
    try:
        config = run_dir.read_config(path)
        with run_dir.presence(path):
            ranks = elastic.init_process_group(config.launch.timeout_s)
            return elastic.report_exit(run(config, ranks, path))
    except UserError as error:
        return confess(error, error.code, error.again)
    except NoMeeting as error:
        return confess(error, BAD_RUN)
    except BaseException as error:  # a bug, reported with its traceback
        return confess(error, None)


def run(config: Config, ranks: elastic.RankInfo, path: Path) -> int:
    """Trains, and leaves the process group.

    The group is left only at an orderly end: after an error living ranks would wait for dead ones.
    """
    code = importlib.import_module(RUN_MODULE).run(config, ranks, path)
    dist.destroy_process_group()
    return code


def confess(error: BaseException, code: int | None, again: bool = False) -> int:
    """Reports the error that ends this rank, and ends it at once.

    Args:
        error: what ended the rank.
        code: the exit status; None for a bug.
        again: whether starting the ranks again may mend it.
    """
    elastic.report_failure(error, code, again=again)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread in the background may wait for a rank that will never answer.
    os._exit(BUG if code is None else code)


def within(words: Sequence[str], start: starters.Start) -> int:
    """Runs as a rank that another launcher started; returns the exit status."""
    die_with_parent(os.getppid())
    code, _ = join_run(words, start)
    return code


def join_run(words: Sequence[str], start: starters.Start) -> tuple[int, Path]:
    """Trains as a rank that another launcher started; returns the exit status and the directory.

    Rank 0 checks the settings before the process group exists, because they set its timeout.
    """
    try:
        starters.adopt(start)
        store = elastic.rendezvous_store()
    except starters.Incomplete as error:
        raise UserError(str(error) if start.rank == 0 else "") from error
    except NoMeeting as error:
        raise UserError(str(error), BAD_RUN) from error
    with ExitStack() as stack:
        if start.rank == 0:
            store.set(DECISION_KEY, json.dumps(_decide(words, start, stack)))
        decision = json.loads(store.get(DECISION_KEY))
        if "fault" in decision:
            store.add(HEARD_KEY, 1)
            # The store may live in the process of rank 0, which must outlive the others' reading.
            while start.rank == 0 and store.add(HEARD_KEY, 0) < start.size:
                time.sleep(0.05)
            raise UserError(decision["fault"] if start.rank == 0 else "", decision["code"])
        config = Config.model_validate(decision["config"])
        path = Path(decision["path"])
        stack.enter_context(run_dir.presence(path))
        os.environ[elastic.SECRET] = shared_secret(path)
        try:
            ranks = elastic.init_process_group(config.launch.timeout_s, store)
            return run(config, ranks, path), path
        except BaseException as error:
            code = error.code if isinstance(error, UserError) else None
            elastic.report_failure(error, code)
            raise


def _decide(words: Sequence[str], start: starters.Start, stack: ExitStack) -> dict[str, Any]:
    """Returns what rank 0 tells the other ranks: the config and its directory, or a fault.

    Args:
        words: KEY=VALUE settings.
        start: the place of this process among all ranks.
        stack: holds the lock of the directory.
    """
    try:
        config = prepare.load_config(words, started=start.size, starter=start.starter)
        config, path = prepare.create_run_dir(config)
        stack.enter_context(run_dir.lock(path))
        prepare.write_record(config, path)
    except UserError as error:
        return {"fault": str(error), "code": error.code}
    return {"config": run_dir.plain_config(config), "path": str(path)}


def console() -> NoReturn:
    """Runs the command `longspan`, which is `python -m trainer`."""
    run_command(main)


if __name__ == "__main__":
    console()
