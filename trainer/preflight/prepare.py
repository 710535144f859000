"""Prepares a run before its ranks start: composes and checks its config, makes its directory."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from trainer import run_dir
from trainer.config.compose import ComposedConfig, compose
from trainer.config.schema import Config
from trainer.config.stages import describe_stage, plan_of
from trainer.errors import UserError
from trainer.launch.nodes import Nodes
from trainer.logs.console import Console
from trainer.preflight.check import check_config
from trainer.preflight.estimate import estimate_lines
from trainer.preflight.match import match_sizes
from trainer.preflight.reach import unreached
from trainer.preflight.recorded import recorded_config
from trainer.secret import shared_secret


def load_config(
    words: Sequence[str],
    started: int | None = None,
    say: Callable[[str], None] | None = None,
    here: Callable[[Config], Config] | None = None,
    starter: str = "torchrun",
    dropped: Callable[[dict[str, str]], None] | None = None,
) -> Config:
    """Returns the checked config of a command line, with its widths fitted where `match=` is set.

    Args:
        words: KEY=VALUE settings; run_dir=PATH alone goes on with the config that lies there.
        started: number of ranks that another launcher has started; None when this command starts
            them.
        say: receives a line about the widths that were fitted; None prints it.
        here: turns the config of the user into that of this machine.
        starter: name of the other launcher.
        dropped: receives the settings that reach no part of the model, each with the sentence
            that would refuse it. Given for a job of a sweep, where other jobs take them; without
            it such a setting is a fault.

    Raises:
        UserError: a line for each fault of the config.
    """
    recorded = recorded_config(words)
    if recorded is None:
        composed = compose(words)
    else:
        composed = ComposedConfig(recorded, given=frozenset({"run_dir"}))
    if composed.config is None:
        raise UserError("\n".join(composed.faults))
    config = composed.config
    if here is not None:
        config = here(config)
    match_report = ""
    match_errors = []
    # Widths cannot be fitted to settings that were put back to their defaults; recorded ones are.
    if not composed.faults and recorded is None:
        try:
            config, match_report = match_sizes(config, words)
        except (UserError, ValueError) as error:
            match_errors = [str(error)]
    given = frozenset() if dropped else composed.given
    errors = check_config(config, given, composed.mended, composed.faults, started, starter)
    # What keeps the model from being built keeps it from being matched: that is said once.
    errors = errors or match_errors
    if errors:
        raise UserError("\n".join(errors))
    if dropped is not None:
        dropped(unreached(config, composed.given))
    # Where several machines give the same command, the first tells for all.
    if match_report and not config.launch.node_rank:
        (say or console_of(config).say)(match_report)
    return config


def console_of(config: Config, file: TextIO | None = None) -> Console:
    """Returns the console of a launcher: lines as those of its ranks, and no bar."""
    style = "json" if config.log.console == "json" else "plain"
    return Console(0, style=style, level=config.log.level, file=file)


def create_run_dir(config: Config) -> tuple[Config, Path]:
    """Makes the run directory; returns the config with its name, and its absolute path."""
    if config.run_dir:
        path = Path(config.run_dir)
        run_dir.make_run_dir(path)
    else:
        path = run_dir.take(config.name)
    return config.model_copy(update={"run_dir": str(path)}), path.resolve()


def write_record(config: Config, path: Path) -> None:
    """Writes the record of a run into its directory, which must be locked.

    Raises:
        UserError: another run was recorded there after the config was checked.
    """
    errors = run_dir.check_run_dir(config)
    if errors:
        raise UserError("\n".join(errors))
    if remark := run_dir.record(path, config):
        console_of(config, sys.stderr).warn(remark)


def rendezvous_of(config: Config, path: Path) -> Nodes | None:
    """Returns the machines that share the run in `path`; None where the run has one machine.

    The name of the folder is the name of their meeting, so that two runs never join.
    """
    launch = config.launch
    if launch.name != "multinode":
        return None
    assert launch.rdzv_endpoint is not None, "check_rendezvous requires it"
    assert launch.node_rank is not None, "check_rendezvous requires it"
    return Nodes(
        many=launch.nodes,
        rank=launch.node_rank,
        endpoint=launch.rdzv_endpoint,
        address=launch.address,
        name=f"longspan-{path.name}",
        timeout_s=launch.timeout_s,
        secret=shared_secret(path),
    )


def dry_run(config: Config, command: Sequence[str]) -> str:
    """Returns the report of launch.dry_run=true: what would be started."""
    parallel = config.parallel
    ranks = (
        f"{parallel.ranks} = parallel.context={parallel.context} x parallel.data={parallel.data},"
        f" engine={config.engine.name}"
    )
    if config.launch.nodes > 1:
        ranks += f", {config.launch.nodes} machines that meet at {config.launch.rdzv_endpoint}"
    path = config.run_dir or f"{run_dir.fresh_path(config.name)} (a fresh one)"
    tokens = f"{config.batch_tokens} tokens"
    rows = f"{config.rows} rows of {config.context_length}"
    lines = [
        f"ranks    {ranks}",
        f"command  {' '.join([sys.executable, *command])}",
        f"run_dir  {path}",
        *(_stage_lines(config) or [f"steps    {config.steps}, each of {tokens} in {rows}"]),
        *estimate_lines(config),
        "nothing was started (launch.dry_run=true)",
    ]
    return "\n".join(lines)


def _stage_lines(config: Config) -> list[str]:
    """Returns a line for each stage; none where the run has one."""
    return [line for stage in plan_of(config) for line in describe_stage(stage)]
