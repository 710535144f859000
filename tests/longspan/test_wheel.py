"""A wheel, installed where nothing else of Longspan is, trains and is a library."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


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
    wheel = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    run(sys.executable, *PIP, *wheel, folder=folder)
    venv.create(folder / "environment", symlinks=True)
    python = folder / "environment" / "bin" / "python"
    (wheel_file,) = folder.glob("longspan-*.whl")
    target = (PIP[0], PIP[1], "--python", python, *PIP[2:], "install", "--no-deps")
    run(sys.executable, *target, wheel_file, folder=folder)
    (packages,) = folder.glob("environment/lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder


@pytest.mark.slow
def test_the_command_trains_and_the_library_opens_the_run(installed, tmp_path):
    binaries = installed / "environment" / "bin"
    assert "finished after" in run(binaries / "longspan", *TRIAL, folder=tmp_path)
    script = (
        "import longspan, trainer, sys;"
        "assert trainer.__file__.startswith(sys.prefix), trainer.__file__;"
        "print(len(longspan.load('mine').generate('1 2', tokens=3)))"
    )
    assert int(run(binaries / "python", "-c", script, folder=tmp_path)) > 0


def test_packages_are_typed(installed):
    for name in ("longspan", "models", "parallel", "trainer"):
        (marker,) = installed.glob(f"environment/lib/python*/site-packages/{name}/py.typed")
        assert marker.is_file()
