"""The shell is offered groups, members, keys and options, quickly."""

import subprocess
import sys
from pathlib import Path

from longspan.completion import SHELLS, candidates, run
from trainer.config.groups import choices, groups

ROOT = Path(__file__).parents[2]


def test_groups_members_keys_and_options():
    assert candidates("mix") == ["mixer="]
    assert candidates("mixer=gated") == ["mixer=gated", "mixer=gated_delta", "mixer=gated_linear"]
    assert candidates("position=") == [f"position={name}" for name in choices("position")]
    assert {f"{group}=" for group in groups()} <= set(candidates(""))
    assert "checkpoint.every=" in candidates("checkpoint.")
    assert "mixer.window=" in candidates("mixer.w")
    assert "evaluation.needle.depths=" in candidates("evaluation.needle.d")
    assert candidates("--h") == ["--help"]
    assert candidates("steps=") == []


def test_every_shell_has_a_script(capsys):
    for shell in SHELLS:
        assert run(["--completion", shell]) == 0
        assert "longspan --complete" in capsys.readouterr().out
    assert run(["--completion", "tcsh"]) == 2
    assert "choose one of bash, zsh, fish" in capsys.readouterr().err
    assert run(["steps=3"]) is None


def test_bash_completes_the_part_behind_the_last_sign(tmp_path):
    """bash breaks words at = and :, and replaces only what is behind the last of them."""
    command = tmp_path / "longspan"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m longspan "$@"\n')
    command.chmod(0o755)
    script = f"""
PATH={tmp_path}:$PATH; cd {ROOT}
eval "$(longspan --completion bash)"
COMP_LINE="longspan steps=3 mixer=slid" COMP_POINT=27
_longspan
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "sliding"


def test_nothing_slow_is_imported():
    script = (
        "import sys; from longspan import completion; completion.candidates('mixer=');"
        "print([name for name in ('torch', 'hydra', 'pydantic') if name in sys.modules])"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
