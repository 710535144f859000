"""A wheel, installed where nothing else of Longspan is, trains, is a library, and does what
docs/how-to/own_parts.md promises from an empty folder: every file and command of it."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.walked_page import walk

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "own_parts.md"
PACKAGED = ("conf", "longspan", "models", "parallel", "scripts", "trainer")
PACKAGES = sysconfig.get_path("purelib")
TRIAL = (
    "experiment=quickstart",
    "steps=3",
    "data=copy",
    "evaluation.every=0",
    "evaluation.sample_tokens=0",
    "context_length=64",
    "batch_tokens=128",
    "model.width=36",
    "model.layers=1",
    "parallel.context=1",
    "wandb.mode=disabled",
    "run_dir=mine",
)
ASK = (
    "import longspan, trainer, sys;"
    "assert trainer.__file__.startswith(sys.prefix), trainer.__file__;"
    "print(len(longspan.load('mine').generate('1 2', tokens=3)))"
)
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")

Give = Callable[[Sequence[str], Path], str]


def run(*words: object, folder: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A fresh environment with the wheel; only what it depends on comes from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A build leaves its files beside the source, and a later one takes what is left for new.
    for name in PACKAGED:
        copied = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=copied)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    wheel = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    run(sys.executable, *PIP, *wheel, folder=folder)
    venv.create(folder / "environment", symlinks=True)
    python = folder / "environment" / "bin" / "python"
    (wheel_file,) = folder.glob("longspan-*.whl")
    target = (PIP[0], PIP[1], "--python", python, *PIP[2:], "install", "--no-deps")
    run(sys.executable, *target, wheel_file, folder=folder)
    (packages,) = folder.glob("environment/lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{PACKAGES}\n")
    return folder


@pytest.fixture(scope="module")
def give(installed) -> Iterator[Give]:
    """Gives a command to the installation and returns what it printed; see installed_server."""
    home = installed / "server"
    home.mkdir()
    # Of the checkout the tests alone, not what lies beside them.
    (home / "tests").symlink_to(ROOT / "tests")
    opened = installed / "opened"
    watched = {
        "OPENED_LOG": str(opened),
        "OPENED_BELOW": str(ROOT),
        "OPENED_PACKAGES": PACKAGES,
    }
    server = subprocess.Popen(
        [installed / "environment/bin/python", "-m", "tests.support.installed_server"],
        cwd=home,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "OMP_NUM_THREADS": "1", **watched},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def answer(words: Sequence[str], folder: Path) -> str:
        print(json.dumps({"command": words, "folder": str(folder)}), file=server.stdin, flush=True)
        done = json.loads(server.stdout.readline())
        assert done["code"] == 0, f"{words}\n{done['out']}{done['err']}"
        assert opened.exists()
        assert opened.read_text() == "", f"{words} opened files of the checkout"
        return done["out"]

    yield answer
    server.stdin.close()
    server.wait(30)


def test_it_has_all_yaml_files_and_is_typed(installed):
    (packages,) = installed.glob("environment/lib/python*/site-packages")
    for name in ("longspan", "models", "parallel", "trainer"):
        assert (packages / name / "py.typed").is_file()
    for room, pattern in (("conf", "*.yaml"), ("scripts", "*.py")):
        here = {path.relative_to(ROOT) for path in (ROOT / room).rglob(pattern)}
        there = {path.relative_to(packages) for path in (packages / room).rglob(pattern)}
        assert here == there
        assert len(there) > 20


def test_the_command_is_on_the_path_of_the_environment(installed, tmp_path):
    listed = run(installed / "environment/bin/longspan", "--completion", "bash", folder=tmp_path)
    assert "longspan" in listed


@pytest.mark.slow
def test_the_quickstart_trains_and_the_library_opens_the_run(give, tmp_path):
    assert "finished after" in give(["longspan", *TRIAL], tmp_path)
    assert int(give(["python", "-c", ASK], tmp_path)) > 0


@pytest.mark.full
def test_the_quickstart_started_as_a_user_starts_it(installed, tmp_path):
    binaries = installed / "environment" / "bin"
    assert "finished after" in run(binaries / "longspan", *TRIAL, folder=tmp_path)
    assert int(run(binaries / "python", "-c", ASK, folder=tmp_path)) > 0


def walked(give: Give, folder: Path, left_out: Sequence[str] = ()) -> dict[str, str]:
    """What each command of the page printed, in order.

    Args:
        left_out: words of commands that are not given.
    """
    folder.mkdir()
    printed: dict[str, str] = {}

    def given(words: Sequence[str]) -> str:
        if not set(left_out).intersection(words):
            printed[" ".join(words)] = give(words, folder)
        return ""

    walk(PAGE, "From an empty folder", folder, given)
    return printed


def lines_of(run: Path, steps: int) -> list[float]:
    """The losses of a run; its source was kept, and the logger wrote each step once."""
    assert (run / "source/1/parts.py").read_text() == (run.parents[1] / "parts.py").read_text()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    diary = (run / "diary.txt").read_text().splitlines()
    told = [f"step {step}: loss {loss:.4f}" for step, loss in enumerate(losses, 1)]
    assert [line for line in diary if ": loss " in line] == told
    assert sum(": right/share " in line for line in diary) == 2
    assert len(losses) == steps
    return losses


@pytest.mark.slow
def test_the_page_trains_and_asks(give, tmp_path):
    folder = tmp_path / "folder"
    printed = walked(give, folder, left_out=("torchrun", "-m"))
    checked, trained, asked = printed.values()
    assert "nothing was started" in checked
    assert "finished after" in trained
    assert len(asked.strip()) > 0
    lines_of(folder / "runs/mine", 4)


@pytest.mark.full
def test_every_command_of_the_page_does_what_it_says(give, tmp_path):
    folder = tmp_path / "folder"
    checked, trained, shared, swept, reported, written, asked = walked(give, folder).values()
    assert "nothing was started" in checked
    assert "finished after" in trained
    assert "finished after" in shared
    alone = lines_of(folder / "runs/mine", 4)
    assert alone == pytest.approx(lines_of(folder / "runs/shared", 4), rel=1e-4)
    assert "right/share" in (folder / "runs/mine/evaluation.jsonl").read_text()
    assert "temperature=0.5" in swept
    assert "temperature=2" in swept
    page = (folder / "sweeps/mine/report/index.html").read_text()
    assert "mixer.temperature=0.5" in page
    assert "temperature" in reported
    assert len(written.strip()) > 0
    assert len(asked.strip()) > 0
