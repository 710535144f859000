"""What happens before the ranks start: the wish is composed and judged, and its directory found."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer import run_dir
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.launch.nodes import Nodes
from trainer.preflight.check import check_config
from trainer.preflight.match import match_sizes
from trainer.reach import unreached
from trainer.secret import shared_secret


def load_config(
    words: Sequence[str],
    started: int | None = None,
    say: Callable[[str], None] = print,
    here: Callable[[Config], Config] | None = None,
    starter: str = "torchrun",
    dropped: Callable[[dict[str, str]], None] | None = None,
) -> Config:
    """The checked config of a command line, its widths fitted where `match=` asks for that.

    started: ranks that somebody else has started already; None when they are ours to start.
    starter: who that was.
    say: is told what was fitted.
    dropped: is told which settings reach no part, with the sentence that refuses each, where that
    is no fault (a job of a sweep, whose other jobs take them).
    here: changes what was asked for into what this machine has to do of it.

    Raises:
        Fault: everything that is wrong with the wish, a line each.
    """
    asked = compose(words)
    if asked.config is None:
        raise UserError("\n".join(asked.faults))
    config = here(asked.config) if here else asked.config
    said = ""
    unfit = []
    if not asked.faults:
        try:
            config, said = match_sizes(config, words)
        except (UserError, ValueError) as error:
            unfit = [str(error)]
    given = frozenset() if dropped else asked.given
    if faults := check_config(config, given, asked.mended, asked.faults, started, starter) or unfit:
        raise UserError("\n".join(faults))
    if dropped:
        dropped(unreached(config, asked.given))
    if said:
        say(said)
    return config


def create_run_dir(config: Config) -> tuple[Config, Path]:
    """The config with its run directory filled in, and that directory, made."""
    if config.run_dir:
        path = Path(config.run_dir)
        run_dir.make_run_dir(path)
    else:
        path = run_dir.take(config.name)
    return config.model_copy(update={"run_dir": str(path)}), path.resolve()


def write_record(config: Config, path: Path) -> None:
    """Write the run's record, once the directory is locked; Fault when another run got there
    first."""
    if faults := run_dir.check_run_dir(config):
        raise UserError("\n".join(faults))
    run_dir.record(path, config)


def rendezvous_of(config: Config, path: Path) -> Nodes | None:
    """The machines that share the run in `path`; None where it has one. The folder's name is what
    they meet under."""
    wish = config.launch
    if wish.name != "multinode":
        return None
    assert wish.rdzv_endpoint is not None and wish.node_rank is not None, "the check asks for both"
    name = f"longspan-{path.name}"
    secret = shared_secret(path)
    return Nodes(
        wish.nodes, wish.node_rank, wish.rdzv_endpoint, wish.address, name, wish.timeout_s, secret
    )


def dry_run(config: Config, command: Sequence[str]) -> str:
    """What launch.dry_run says instead of starting."""
    spread = f"parallel.context={config.parallel.context} x parallel.data={config.parallel.data}"
    path = config.run_dir or f"{run_dir.fresh_path(config.name)} (a fresh one)"
    machines = (
        f", {config.launch.nodes} machines that meet at {config.launch.rdzv_endpoint}"
        if config.launch.nodes > 1
        else ""
    )
    rows = f"{config.rows} rows of {config.context_length}"
    return "\n".join(
        [
            f"ranks    {config.parallel.ranks} = {spread}, engine={config.engine.name}{machines}",
            f"command  {' '.join([sys.executable, *command])}",
            f"run_dir  {path}",
            f"steps    {config.steps}, each of {config.batch_tokens} tokens in {rows}",
            "nothing was started (launch.dry_run=true)",
        ]
    )
