"""Weights & Biases, which never stops or slows a run: without a key or a network it writes to
<run_dir>/wandb/ instead.

Only rank 0 imports this module, and only when `wandb.mode` is not disabled. Metrics keep the names
of metrics.jsonl and have `step` as their x-axis; `by_tokens/loss` and everything under
`evaluation/` have `tokens`.
"""

import netrc
import os
import secrets
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from trainer.files.safe_files import make_inside, read_inside, replace_inside
from trainer.logs.jsonl import BESIDE, MetricsRow
from trainer.logs.labels import Labels, variable
from trainer.logs.redact import without_secrets, word_without_secrets

PROBE_S = 3.0
FINISH_S = 30.0
UPLOAD_S = 300.0  # instead of FINISH_S, where a checkpoint is sent as well
ALERT_GAP_S = 60.0  # between two alerts of one title
MAX_TITLE = 63
IDENTITY = "run_id"


def identity_of(directory: Path | str) -> str | None:
    """Reads the id of the W&B run of a run directory; None when it never had one."""
    try:
        return read_inside(Path(directory), f"wandb/{IDENTITY}").decode("ascii").strip() or None
    except FileNotFoundError:
        return None


class WandbLogger:
    """The W&B run of a run directory.

    Args:
        directory: of the run; files go into its wandb/.
        mode: auto (online when a key is found, else offline), online or offline.
        labels: under which the server shows the run, and where W&B writes.
        init_timeout_s: the longest wait for the server at the start; then the run is offline.
        config: of the run; uploaded without secrets.
        identity: the run's id from its checkpoint; None = the run directory's own, or a new one.
        say: takes a line for the user.

    No method raises because of W&B: the first error is said, and from then on nothing more is sent.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        mode: str,
        labels: Labels,
        config: dict[str, Any],
        init_timeout_s: float = 10.0,
        identity: str | None = None,
        say: Callable[[str], None] = print,
    ):
        self.directory = Path(directory)
        self.say = say
        self.run: Any = None
        self.tokens = 0
        self.tables: dict[str, Sequence[dict[str, Any]]] = {}
        self.root = labels.folder or self.directory
        self.identity = labels.identity or identity or variable("id") or secrets.token_hex(4)
        # W&B's reports about itself would hold the process up at its end, for many seconds, when
        # the server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            self.identity = labels.identity or identity or identity_of(directory) or self.identity
            self.directory.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(parents=True, exist_ok=True)  # W&B would take another folder in silence
            make_inside(self.directory, "wandb")
            self._keep_identity()
            mode = self._mode(mode, min(PROBE_S, init_timeout_s))
            if mode == "offline":
                # Its telemetry too, which would wait for the network when the process ends.
                wandb.setup(wandb.Settings(silent=True, mode="offline"))
            with _command_without_secrets():
                self._open(
                    mode, init_timeout_s, **_shown_as(labels), config=without_secrets(config)
                )
        except Exception as error:
            self._lost(error)

    def _mode(self, mode: str, wait_s: float) -> str:
        """Returns the mode that is possible; says when it is not the requested one."""
        known = wandb.setup(
            wandb.Settings(silent=True)
        ).settings  # reads WANDB_* and W&B's own settings files
        if mode == "auto" and known.mode in ("offline", "disabled", "dryrun"):
            return "disabled" if known.mode == "disabled" else "offline"
        if mode not in ("auto", "online"):
            return mode
        if not (
            known.api_key
            or getattr(known, "identity_token_file", None)
            or _in_netrc(known.base_url)
        ):
            if mode == "online":
                self.say(
                    "W&B: wandb.mode=online, but there is no key; going on offline (`wandb login`"
                    " stores a key)"
                )
            return "offline"
        if (why := unreachable(known.base_url, wait_s)) is not None:
            self.say(
                f"W&B: {known.base_url} cannot be reached ({why}); going on offline, `wandb sync`"
                " sends it later"
            )
            return "offline"
        return "online"

    def _open(self, mode: str, wait_s: float, **run: Any) -> None:
        settings = {
            "silent": True,
            "console": "off",
            "init_timeout": wait_s,
            "disable_git": True,
            "save_code": False,
        }
        settings |= (
            {"finish_timeout": FINISH_S} if "finish_timeout" in wandb.Settings.model_fields else {}
        )
        wishes = {"dir": str(self.root), "id": self.identity, "resume": "allow", **run}
        try:
            self.run = wandb.init(mode=mode, settings=wandb.Settings(**settings), **wishes)  # type: ignore[arg-type]
        except Exception as error:
            if mode != "online":
                raise
            self.say(
                f"W&B: the server did not answer ({_brief(error)}); going on offline, `wandb sync`"
                " sends it later"
            )
            wandb.teardown(
                exit_code=1
            )  # its service holds on to the id of the run that did not open
            wandb.setup(wandb.Settings(silent=True, mode="offline"))
            self.run = wandb.init(mode="offline", settings=wandb.Settings(**settings), **wishes)
        if self.run.id != self.identity:  # an agent of a W&B sweep has already named the run
            self.identity = self.run.id
            self._keep_identity()
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        for name in ("by_tokens/*", "evaluation/*"):
            self.run.define_metric(name, step_metric="tokens")

    def _keep_identity(self) -> None:
        replace_inside(self.directory, f"wandb/{IDENTITY}", self.identity + "\n")

    def _lost(self, error: Exception) -> None:
        self.run = None
        self.say(
            f"W&B: switched off for the rest of this run ({_brief(error)}); metrics.jsonl has"
            " everything"
        )

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self.run is None:
            return
        try:
            self.run.log({"step": step, "tokens": self.tokens, **values}, step=step)
        except Exception as error:
            self._lost(error)

    def step(self, row: MetricsRow) -> None:
        """Sends the row of a step."""
        self.tokens = row.tokens
        parts = row._asdict()
        beside = {part: parts.pop(part) or {} for part in BESIDE}
        values = {name: value for name, value in parts.items() if value is not None}
        values |= {
            f"{part}/{name}": value
            for part, found in beside.items()
            for name, value in found.items()
        }
        if row.loss is not None:
            values["by_tokens/loss"] = row.loss
        self._log(row.step, values)

    def evaluation(
        self,
        step: int,
        name: str,
        value: float,
        by_position: Sequence[dict[str, Any]] | None = None,
        cells: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """Send one value of an evaluation; its parts by position, or its cells, are a table at the
        end, the last ones only."""
        self.tables |= {f"report/{name}_by_position": by_position} if by_position else {}
        self.tables |= {f"report/{name}": cells} if cells else {}
        self._log(step, {f"evaluation/{name}": value})

    def alert(self, title: str, text: str) -> None:
        """Have the server send a message to the user; without a network it is sent with the
        rest."""
        if self.run is None:
            return
        try:
            self.run.alert(
                title=title[:MAX_TITLE], text=text, level="WARN", wait_duration=ALERT_GAP_S
            )
        except Exception as error:
            self._lost(error)

    @property
    def place(self) -> str | None:
        """The run's address, or the directory that `wandb sync` takes; None when switched off."""
        if self.run is None:
            return None
        return str(Path(self.run.dir).parent) if self.run.offline else self.run.url

    def finish(
        self,
        summary: dict[str, Any],
        images: Sequence[Path] = (),
        *,
        tables: Mapping[str, Sequence[dict[str, Any]]] = {},
        checkpoint: Path | None = None,
        exit_code: int = 0,
        wait_s: float | None = None,
    ) -> None:
        """Send the summary, the pictures, tables by name (their rows, in order) and a checkpoint,
        and close the run.

        Waits for the network at most wait_s, by itself half a minute, with a checkpoint five
        minutes. W&B keeps a copy of the checkpoint, so that a run that goes on may remove it.
        """
        if self.run is None:
            return
        run = self.run
        trouble = []
        rows_of = {**self.tables, **{f"report/{name}": rows for name, rows in tables.items()}}
        wait_s = wait_s or (FINISH_S if checkpoint is None else UPLOAD_S)

        def close() -> None:
            try:
                run.summary.update(summary)
                shown: dict[str, Any] = {
                    f"report/{image.stem}": wandb.Image(str(image)) for image in images
                }
                shown |= {name: _table(rows) for name, rows in rows_of.items()}
                if shown:
                    run.log(shown)
                if checkpoint is not None:
                    artifact = wandb.Artifact(
                        f"checkpoint-{self.identity}",
                        "checkpoint",
                        metadata={"of": checkpoint.name},
                    )
                    artifact.add_dir(str(checkpoint))
                    run.log_artifact(artifact)
                run.finish(exit_code=exit_code)
            except Exception as error:
                trouble.append(error)

        thread = threading.Thread(target=close, daemon=True)
        began = time.monotonic()
        thread.start()
        thread.join(wait_s + 5)
        if trouble:
            self._lost(trouble[0])
        elif (
            thread.is_alive() or time.monotonic() - began > wait_s
        ):  # W&B gives up by then, and does not say so
            self.say(
                "W&B: the server is slow or gone; `wandb sync` sends what it lacks from"
                f" {self.root / 'wandb'}"
            )


@contextmanager
def _command_without_secrets() -> Iterator[None]:
    """Hide secrets from W&B's own record of the command; under somebody else's launcher it holds
    the user's settings."""
    command = sys.argv
    sys.argv = [word_without_secrets(word) for word in command]
    try:
        yield
    finally:
        sys.argv = command


def _shown_as(labels: Labels) -> dict[str, Any]:
    """The labels as wandb.init takes them."""
    return {
        "project": labels.project,
        "entity": labels.entity,
        "name": labels.name,
        "group": labels.group,
        "tags": list(labels.tags) or None,
        "notes": labels.notes,
    }


def _table(rows: Sequence[dict[str, Any]]) -> wandb.Table:
    columns: list[Any] = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(
        columns=columns, data=[[row.get(column) for column in columns] for row in rows]
    )


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _in_netrc(address: str) -> bool:
    """Reports that the user's netrc file has a key for this server, or for W&B's own."""
    for path in (Path(os.path.expanduser(name)) for name in ("~/.netrc", "~/_netrc")):
        try:
            hosts = netrc.netrc(path).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        if urlsplit(address).netloc in hosts or "api.wandb.ai" in hosts:
            return True
    return False


def unreachable(address: str, wait_s: float) -> str | None:
    """Returns why no server answers at an address, or None when one does.

    Takes at most `wait_s` seconds.
    """
    found: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(address, timeout=wait_s):
                found.append(None)
        except urllib.error.HTTPError:
            found.append(None)  # an answer, if an unfriendly one
        except Exception as error:
            reason = getattr(
                error, "reason", error
            )  # certificates are W&B's own affair: it may know more of them
            found.append(None if isinstance(reason, ssl.SSLError) else str(reason))

    thread = threading.Thread(
        target=ask, daemon=True
    )  # a name server that does not answer knows no timeout
    thread.start()
    thread.join(wait_s)
    return found[0] if found else f"no answer in {wait_s:g} s"
