"""Locks and folders on systems that lack them: one line, and the work goes on; or one message."""

import errno
import fcntl
import getpass
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer import entry, run_dir
from trainer.data import cache, folders
from trainer.data.cache import place
from trainer.data.open import check, open_stream
from trainer.data.sources.base import build_source
from trainer.errors import UserError
from trainer.files import locks
from trainer.files.locks import exclusive, held
from trainer.watchdog import HeartbeatNote, describe_hang

SETTINGS = {"context_length": 8, "rows": 1, "seed": 0}


@pytest.fixture
def lockless(monkeypatch):
    """A file system without locks."""

    def flock(file, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    locks.say_lacking.cache_clear()


def test_without_file_locks_a_corpus_is_still_built_once(lockless, tmp_path, caplog):
    (tmp_path / "a.txt").write_text("text")
    built = []
    node = {
        "_target_": "trainer.data.sources.files.Files",
        "path": f"{tmp_path}/a.txt",
        "cache": str(tmp_path / "cache"),
        "held_out": 0.0,
    }
    usual = cache._build

    def slow(*words):
        built.append(1)
        time.sleep(0.5)
        return usual(*words)

    cache._build = slow
    try:
        threads = [
            threading.Thread(target=open_stream, args=(node,), kwargs=SETTINGS) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        cache._build = usual
    assert len(built) == 1 and not list((tmp_path / "cache").glob("*.held*"))
    assert [
        record.getMessage() for record in caplog.records if "no file locks" in record.getMessage()
    ]


def test_without_file_locks_a_run_directory_has_one_launcher_at_a_time(
    lockless, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(run_dir, "DYING_S", 0.5)
    with run_dir.lock(tmp_path):
        with run_dir.presence(tmp_path):
            pass
        with pytest.raises(UserError, match=f"is in use: .* held by process {os.getpid()} on "):
            with run_dir.lock(tmp_path):
                pass
    with run_dir.lock(tmp_path):
        pass
    assert sum("no file locks" in record.getMessage() for record in caplog.records) == 1


def test_an_error_of_another_kind_is_not_taken_for_missing_locks(tmp_path, monkeypatch):
    def flock(file, kind):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        with exclusive(tmp_path / "x.lock", lambda: None):
            pass


HOLD = """
import sys, time
from pathlib import Path
from trainer.files.locks import held
with held(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("here", [True, False])
def test_a_killed_holder_is_noticed_on_this_machine_by_its_process_on_others_by_its_silence(
    here, tmp_path, monkeypatch
):
    monkeypatch.setattr(locks, "STILL_S", 1.0)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    if not here:
        owner = tmp_path / "x" / "owner"
        owner.write_text(owner.read_text().partition(" on ")[0] + " on another machine")
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    with held(tmp_path / "x", lambda: None, 20):
        pass
    assert (time.monotonic() - began < 1.0) == here


def test_a_living_holder_keeps_its_lock_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(locks, "STILL_S", 0.6)
    waited = []
    with held(tmp_path / "x", lambda: None):
        (tmp_path / "x" / "owner").write_text("1 on another machine")
        with pytest.raises(TimeoutError, match="another machine"):
            with held(tmp_path / "x", lambda: waited.append(1), 1.5):
                pass
    assert waited == [1] and not (tmp_path / "x").exists()


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without HOME and without a line in the list of users; folders for temporary files are
    the test's."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folders.spare_folder.cache_clear()
    yield tmp_path
    folders.spare_folder.cache_clear()


def source(tmp_path, **settings):
    (tmp_path / "a.txt").write_text("text")
    return build_source(
        {
            "_target_": "trainer.data.sources.files.Files",
            "path": f"{tmp_path}/a.txt",
            "held_out": 0.0,
        }
        | settings
    )


def test_without_a_home_folder_the_tokens_lie_among_temporary_files(homeless, caplog):
    data = source(homeless)
    folder = place(data, data.files(), data.tokenizer())
    assert folder.parent == homeless / f"longspan-{os.getuid()}" / "cache"
    place(data, data.files(), data.tokenizer())
    assert [record.getMessage() for record in caplog.records] == [
        f"a home folder is not known: {folder.parent} is taken instead, and may be gone with the"
        " next start of the machine"
    ]
    assert len(open_stream(data, **SETTINGS).documents) == 1 and folder.is_dir()
    assert not Path("~").exists()


def test_a_cache_that_cannot_be_written_is_replaced_or_said(tmp_path, monkeypatch, homeless):
    usual = os.access
    closed = str(tmp_path / "closed")
    monkeypatch.setenv("XDG_CACHE_HOME", closed)
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith(closed) and usual(path, mode)
    )
    os.mkdir(closed)
    data = source(tmp_path)
    assert "longspan-" in str(place(data, data.files(), data.tokenizer()))
    (said,) = check(source(tmp_path, cache=f"{closed}/tokens"))
    assert said.startswith(f"data.cache={closed}/tokens: it cannot be written")


def test_no_folder_to_write_to_at_all_is_one_message(tmp_path, monkeypatch, homeless):
    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    (said,) = check(source(tmp_path))
    assert (
        "data.cache=null" in said
        and "No usable temporary directory" in said
        and "give one with data.cache" in said
    )


def test_a_folder_of_somebody_else_is_not_taken(tmp_path, monkeypatch, homeless):
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    (said,) = check(source(tmp_path))
    assert "is another user's" in said


def test_a_tilde_of_nobody_is_one_message(tmp_path, homeless):
    (said,) = check(source(tmp_path, tokenizer="~nobody-here/tok.json", cache=str(tmp_path / "c")))
    assert "there is no such file" in said


def test_a_process_without_home_and_user_name_is_given_both(homeless, monkeypatch, caplog):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    folders.furnish()
    assert getpass.getuser() == f"user{os.getuid()}"
    assert os.environ["HOME"] == str(
        homeless / f"longspan-{os.getuid()}" / "home"
    ) and os.path.isdir(os.environ["HOME"])
    for variable in ("HOME", "LOGNAME"):
        monkeypatch.setenv(variable, os.environ[variable])
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "a home folder is not known"
    ]


def test_what_the_user_set_is_left_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "somebody")
    before = dict(os.environ)
    folders.furnish()
    assert dict(os.environ) == before


def test_no_folder_for_temporary_files_is_one_message_and_exit_status_3(monkeypatch, capsys):
    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    monkeypatch.setattr(entry, "protect", lambda: None)
    with pytest.raises(SystemExit) as end:
        entry.run_command(lambda words: 0)
    assert end.value.code == 3 and capsys.readouterr().err.startswith(
        "TMPDIR: No usable temporary directory"
    )


def test_a_clock_that_is_set_back_does_not_hide_who_stands_still():
    beats = [1000.0, 1000.0 - 3600, 1000.0 + 3600]
    notes = [HeartbeatNote(3, 4, "forward", "", False, beat) for beat in beats]
    said = describe_hang(notes, (4, "forward"), 30.0, 1000.0)
    assert (
        "rank 1 of 3 stands still" in said
        and "rank 2 of 3 stands still" in said
        and "rank 0" not in said
    )
