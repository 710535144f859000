"""Commands of an installation that is not the checkout, without the imports of each.

    environment/bin/python -m tests.support.installed_server

It reads commands as lines of JSON, {"command": [...], "folder": ...}, the first word being
longspan, python or torchrun, and answers each with {"code": ..., "out": ..., "err": ...}. Processes
are forked as in tests/support/forked_python.py, and what they open is watched by
tests/support/opened_files.py.
"""

import json
import sys
from collections.abc import Sequence
from subprocess import DEVNULL

from tests.support import forked_python, pool

STARTS = {
    "longspan": [sys.executable, "-m", "longspan"],
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}


def serve() -> None:
    """Answers every command until the input ends."""
    # First, so that it sees the imports of the other modules.
    pool.PRELOADED.insert(0, "tests.support.opened_files")
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(_done(asked["command"], asked["folder"])), flush=True)


def _done(command: Sequence[str], folder: str) -> dict[str, object]:
    words = [*STARTS[command[0]], *command[1:]]
    environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "OMP_NUM_THREADS": "1"}
    done = forked_python.run(words, cwd=folder, env=environment, stdin=DEVNULL)
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


if __name__ == "__main__":
    serve()
