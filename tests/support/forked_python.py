"""Whole commands without their imports: a process of Python forked from one that has imported all.

    process = Popen([sys.executable, "-m", "trainer", *words], stdout=PIPE, ...)
    done = run([sys.executable, "-m", "trainer", *words])       its output is captured

They are `subprocess.Popen` and `subprocess.run`, but where the program is this interpreter the new
process is forked from the server of tests/support/pool.py, and so is every interpreter that it
starts in turn: a launcher and its ranks cost a second and not the half minute that it takes to
import torch as often. Process numbers, parents, sessions, signals, environments and open files are
those of started processes. Of what `ps` shows the command line and the first environment are not:
they are the server's.

One test of every kind of start uses subprocess itself (tests/trainer/test_starts.py).
"""

import atexit
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.support.pool import server_context

GIVEN = (  # of subprocess.Popen._execute_child, in its order
    *("arguments", "executable", "preexec", "close_fds", "pass_fds", "cwd", "environment"),
    *("startupinfo", "creationflags", "shell", "stdin", "stdin_ours", "stdout_ours", "stdout"),
    *("stderr_ours", "stderr", "restore_signals", "gid", "gids", "uid", "umask", "session"),
    "process_group",
)
MOST_FILES = 1024  # numbers of open files that a forked process closes
STREAMS = ("stdin", "stdout", "stderr")


class Popen(subprocess.Popen):
    """A process that the test starts; the server forks it."""

    process: Any = None

    def _execute_child(self, *given: Any) -> None:
        wish = dict(zip(GIVEN, given, strict=True))
        if not _is_python(wish["arguments"]) or torch.cuda.is_available():
            return super()._execute_child(*given)  # pyright: ignore
        files = {}
        for number, name in enumerate(STREAMS):
            handle = number if wish[name] == -1 else wish[name]
            files[number] = Connection(os.dup(handle))
        environment = dict(os.environ if wish["environment"] is None else wish["environment"])
        cwd = os.fspath(wish["cwd"] or os.getcwd())
        self.process = server_context().Process(
            target=_serve,
            args=(wish["arguments"], environment, cwd, files, wish["session"], wish["preexec"]),
            daemon=True,  # it does not outlive the tests
        )
        self.process.start()
        self.pid = self.process.pid
        self._child_created = True
        _close_given(self, wish)

    def _internal_poll(self, *given: Any, **more: Any) -> int | None:
        if self.process is None:
            return super()._internal_poll(*given, **more)  # pyright: ignore
        if self.returncode is None:
            self.returncode = self.process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.process is None:
            return super()._wait(timeout)  # pyright: ignore
        if self.returncode is None:
            self.process.join(timeout)
            if self._internal_poll() is None:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


def run(command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess:
    """Runs a command to its end, both of its streams as text.

    Args:
        command: the program and its arguments.
        settings: `timeout` in seconds, and what Popen takes.
    """
    timeout = settings.pop("timeout", 300)
    pipe = subprocess.PIPE
    with Popen(command, stdout=pipe, stderr=pipe, text=True, **settings) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


class _Fork(subprocess.Popen):
    """A process that a forked process starts: its own child."""

    def _execute_child(self, *given: Any) -> None:
        wish = dict(zip(GIVEN, given, strict=True))
        if not _is_python(wish["arguments"]):
            return super()._execute_child(*given)  # pyright: ignore
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            _close_given(self, wish)
            return
        try:
            _forget_parent()
            for number, name in enumerate(STREAMS):
                if wish[name] != -1:
                    os.dup2(wish[name], number)
            # Locks, pipes and connections of the parent, as exec would close them.
            os.closerange(3, MOST_FILES)
            if wish["cwd"] is not None:
                os.chdir(wish["cwd"])
            environment = dict(os.environ if wish["environment"] is None else wish["environment"])
            _become(environment, wish["session"], wish["preexec"])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        _interpret(wish["arguments"])


def _is_python(arguments: Any) -> bool:
    return not isinstance(arguments, str | bytes) and arguments[0] == sys.executable


def _close_given(process: Any, wish: dict[str, Any]) -> None:
    process._close_pipe_fds(
        wish["stdin"],
        wish["stdin_ours"],
        wish["stdout_ours"],
        wish["stdout"],
        wish["stderr_ours"],
        wish["stderr"],
    )


def _serve(
    arguments: Sequence[str],
    environment: dict[str, str],
    cwd: str,
    files: dict[int, Connection],
    session: bool,
    preexec: Callable[[], None] | None,
) -> None:
    for number, file in files.items():
        os.dup2(file.fileno(), number)
        file.close()
    os.chdir(cwd)
    multiprocessing.current_process()._config["daemon"] = False  # pyright: ignore
    subprocess.Popen = subprocess_handler.Popen = _Fork
    _become(environment, session, preexec)
    _interpret(arguments)


def _forget_parent() -> None:
    """Signals as after exec: what was ignored stays ignored, handlers go."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)


def _become(environment: dict[str, str], session: bool, preexec: Callable[[], None] | None) -> None:
    if session:
        os.setsid()
    if preexec is not None:
        preexec()
    # A new interpreter starts its own at the first need.
    resource_tracker._resource_tracker._fd = None  # pyright: ignore
    resource_tracker._resource_tracker._pid = None  # pyright: ignore
    os.environ.clear()
    os.environ.update(environment)
    random.seed()


def _interpret(arguments: Sequence[str]) -> NoReturn:
    """Does what `python ARGUMENTS` does, and leaves as it does."""
    _, *words = arguments
    if words[0] == "-u":
        words = words[1:]
        sys.stdout.reconfigure(write_through=True)  # pyright: ignore
    code = 1
    try:
        _program(words)
        code = 0
    except SystemExit as end:
        code = _status(end.code)
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # pyright: ignore
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _program(words: Sequence[str]) -> None:
    first, *rest = words
    # As the interpreter does it; the server's own entries stay behind.
    sys.path.insert(0, os.getcwd() if first in ("-m", "-c") else os.path.dirname(first))
    if first == "-m":
        sys.argv = rest
        sys.modules.pop(f"{rest[0]}.__main__", None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _status(code: Any) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return 1
