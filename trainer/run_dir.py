"""Run directory: one writer at a time, and a record of the config and the environment."""

import fcntl
import itertools
import json
import os
import platform
import time
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainer.config.own.source import save_source
from trainer.config.schema import Config
from trainer.data.sources.base import kind_of
from trainer.errors import BAD_RUN, UserError
from trainer.files.limited_reader import yaml_file
from trainer.files.locks import flocked, held, say_lacking
from trainer.files.safe_files import LINKED, links_inside, open_inside, replace_inside
from trainer.logs.environment import environment

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
LOCK = ".lock"
RANKS_LOCK = ".ranks.lock"
SCRATCH = ".launch"
FREE = (
    "parallel",
    "engine",
    "launch",
    "log",
    "logger",
    "logs",
    "prefetch",
    "wandb",
    "checkpoint",
    "evaluation",
    "resume",
    "run_dir",
    "steps",
)
FREE += ("schedule.extend",)
STAGE_FREE = ("name", "parallel", "checkpointing")
HELD = ".lock.held"
DYING_S = 6.0  # ranks whose launcher was killed are gone within this time


def plain_config(config: Config) -> dict[str, Any]:
    """Returns the config as plain data under the names that the command line uses."""
    return config.model_dump(mode="json", by_alias=True)


def read_config(directory: Path) -> Config:
    """Returns the config that a run directory records.

    Raises:
        ValueError: the directory holds no config of a run.
        OSError: it cannot be read.
    """
    value = yaml_file(directory / CONFIG, follow=False)
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(
            f"{directory / CONFIG} is no config of a run ({where}: {first['msg']})"
        ) from error


def holds_run(directory: Path) -> bool:
    # Unlike Path.is_file, it takes a name that is too long for one that is not there.
    return os.path.isfile(directory / CONFIG)


def has_checkpoint(directory: str) -> bool:
    """Tells whether a run in a directory goes on from a checkpoint of its own."""
    return any((Path(directory) / "checkpoints").glob("step_*"))


def fresh_path(name: str, root: Path = Path("runs")) -> Path:
    """Returns a directory name that is free now, to be shown; `take` makes one."""
    return next(path for path in _names(name, root) if not os.path.lexists(path))


def _names(name: str, root: Path) -> Iterator[Path]:
    """Yields names for a directory: runs/NAME-DATE-TIME, then numbered ones.

    Runs that start in the same second need the numbers.
    """
    first = root / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    yield first
    for number in itertools.count(2):
        yield first.with_name(f"{first.name}-{number}")


def take(name: str, root: Path = Path("runs")) -> Path:
    """Makes a fresh directory; of several processes that want one name, mkdir lets one have it."""
    for path in _names(name, root):
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if not root.is_dir():
                raise UserError(
                    f"run_dir={path} cannot be made: {root} is a file; give run_dir=PATH"
                ) from None
        except OSError as error:
            raise UserError(
                f"run_dir={path} cannot be made: {error.strerror}; choose another run_dir"
            ) from error
        else:
            return path
    raise AssertionError("the names have no end")


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, old value, new value) for every leaf in which two plain configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix.rstrip("."), old, new


def check_run_dir(config: Config) -> list[str]:
    """Returns why a config cannot use its run directory, or the run that it resumes."""
    faults = []
    if config.run_dir is not None:
        if any(
            unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in config.run_dir
        ):
            # it is written into batch scripts, records and messages, where it would begin a line of
            # its own
            return [
                f"run_dir={config.run_dir!r}: it holds a line break or another control character;"
                " choose another run_dir"
            ]
        directory = Path(config.run_dir)
        if directory.exists() and not directory.is_dir():
            return [f"run_dir={directory}: it is a file; name a directory"]
        if faults := linked(directory):
            return faults
        if holds_run(directory):
            if config.resume == "never":
                return [
                    f"resume=never, but run_dir={directory} holds a run; choose another run_dir, or"
                    " resume=auto"
                ]
            faults += other_run(config, directory)
    if config.resume not in ("auto", "never"):
        faults += _judge_source(config)
    return faults


def linked(directory: Path) -> list[str]:
    """Returns a message about symbolic links in a run directory, which a run never follows."""
    try:
        links = links_inside(directory) if directory.is_dir() else []
    except OSError as error:
        return [f"run_dir={directory} cannot be read: {error.strerror}; choose another run_dir"]
    return (
        [f"run_dir={directory}: {links[0]}: {LINKED}, or choose another run_dir"] if links else []
    )


def _judge_source(config: Config) -> list[str]:
    """Returns the faults of resume=PATH, a run directory or one of its checkpoints."""
    source = Path(config.resume)
    if not os.path.isdir(source):
        return [
            f"resume={source}: there is no such directory; name a run directory or a checkpoint, or"
            " resume=auto"
        ]
    run = source if (source / "checkpoints").is_dir() else source.parent.parent
    if source != run and source.parent.name != "checkpoints":
        return [
            f"resume={source}: it holds no checkpoints/; name a run directory, or a step_... folder"
            " of one"
        ]
    return other_run(config, run) if holds_run(run) else []


def other_run(config: Config, directory: Path) -> list[str]:
    """Returns a message for each setting in which the run in `directory` is another run."""
    try:
        old = plain_config(read_config(directory))
    except (ValueError, OSError) as error:
        return [
            f"{directory / CONFIG} cannot be read ({str(error).splitlines()[0]}); choose another"
            " run_dir"
        ]
    free = (*FREE, "name", *_decided_by_content(old, config))
    # What a run began from is of no use to one that goes on; another beginning is another run.
    if config.init_from is None or config.resume not in ("auto", "never"):
        free += ("init_from", "init_from_strict")
    new = plain_config(config)
    begun = len(old["stages"])
    for tree in (old, new):
        tree["stages"] = {str(index): stage for index, stage in enumerate(tree["stages"])}
    faults = []
    for key, was, value in differences(old, new):
        if key.partition(".")[0] in free or key in free or _is_free_in_stage(key, begun):
            continue
        faults.append(
            f"{key}={_word(value)}: the run in {directory} has {key}={_word(was)}; use that value,"
            " or another run_dir"
        )
    return faults


def _is_free_in_stage(key: str, begun: int) -> bool:
    """Tells whether a setting of a stage may differ; whole stages may be added behind the last.

    Args:
        key: stages.N, or stages.N.KEY.
        begun: number of stages that the run was begun with.
    """
    group, _, rest = key.partition(".")
    index, _, inner = rest.partition(".")
    if group != "stages" or not index:
        return False
    added = not inner and 0 < begun <= int(index)
    return added or inner.partition(".")[0] in STAGE_FREE


def _decided_by_content(old: dict[str, Any], config: Config) -> list[str]:
    """Returns the settings of the data that may differ, because its content is compared later."""
    return _settings_of_place(old["data"], plain_config(config)["data"], "data")


def _settings_of_place(old: Any, new: Any, where: str) -> list[str]:
    """Returns the settings of a source, and of those that it mixes, that its content decides."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return []
    if old.get("_target_") != new.get("_target_"):
        return []
    try:
        kind = kind_of(new.get("_target_"))
    except ValueError:  # said elsewhere
        return []
    keys = [f"{where}.{key}" for key in kind.content_decides]
    mixed = old.get("sources")
    for name, node in mixed.items() if isinstance(mixed, dict) else []:
        keys += _settings_of_place(
            node, (new.get("sources") or {}).get(name), f"{where}.sources.{name}"
        )
    return keys


def _word(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Makes this process the one launcher of the directory for as long as the context lasts.

    Raises:
        UserError: another process runs here, or ranks of a killed launcher do not end.
    """
    with _opened(directory / LOCK) as launcher, _opened(directory / RANKS_LOCK) as ranks:
        taken = _take(launcher, fcntl.LOCK_EX, 0.0)
        if taken is None:
            with _locked_by_folder(directory):
                yield
            return
        if not taken:
            owner = os.pread(launcher, 200, 0).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"run_dir={directory} is in use by {owner}; wait for it, or choose another run_dir"
            )
        os.ftruncate(launcher, 0)
        os.pwrite(launcher, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        if not _take(ranks, fcntl.LOCK_EX, DYING_S):
            raise UserError(
                f"run_dir={directory}: ranks of an earlier launch still run here; end them, or"
                " choose another"
            )
        fcntl.flock(ranks, fcntl.LOCK_UN)
        yield


@contextmanager
def presence(directory: Path) -> Iterator[None]:
    """Keeps other launchers out of the directory while this rank lives, even without its own."""
    with _opened(directory / RANKS_LOCK) as file:
        _take(file, fcntl.LOCK_SH, DYING_S)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = open_inside(path.parent, path.name, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        why = f"{path.name}: {error.strerror}"
        raise UserError(
            f"run_dir={path.parent} cannot be written: {why}; choose another run_dir"
        ) from error
    try:
        yield file
    finally:
        os.close(file)


def _take(file: int, kind: int, patience_s: float) -> bool | None:
    """Takes a lock; returns whether that worked in time, None where there are no locks."""
    end = time.monotonic() + patience_s
    while (taken := flocked(file, kind)) is False and time.monotonic() < end:
        time.sleep(0.1)
    return taken


@contextmanager
def _locked_by_folder(directory: Path) -> Iterator[None]:
    """Locks the directory where the file system has no locks; ranks are not counted then.

    Raises:
        UserError: another launcher runs here.
    """
    say_lacking(str(directory))
    with ExitStack() as stack:
        try:
            stack.enter_context(held(directory / HELD, lambda: None, DYING_S))
        except TimeoutError as error:
            raise UserError(
                f"run_dir={directory} is in use: {error}; wait for it, or choose another run_dir"
                f" (after a crash of another machine remove {directory / HELD})"
            ) from error
        except OSError as error:
            raise UserError(
                f"run_dir={directory} cannot be written: {error.strerror}; choose another run_dir"
            ) from error
        yield


def make_run_dir(directory: Path) -> None:
    """Makes the directory.

    Raises:
        UserError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run_dir={directory} cannot be made: {error.strerror}; choose another run_dir"
        ) from error


def record(directory: Path, config: Config) -> str:
    """Writes config.yaml (resolved), environment.json and source/; each file is replaced whole.

    Returns:
        A remark where the source of the user's own parts is another than at the last start.

    Raises:
        UserError: they cannot be written.
    """
    try:
        replace_inside(
            directory,
            CONFIG,
            yaml.safe_dump(plain_config(config), sort_keys=False, allow_unicode=True),
        )
        replace_inside(directory, ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
        return save_source(directory, plain_config(config))
    except OSError as error:
        raise UserError(
            f"run_dir={directory} cannot be written: {error.strerror}; make room, or choose"
            " another",
            BAD_RUN,
        ) from error
