"""Run commands one after the other in one subprocess, so that imports are paid for only once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import open_mythos

_CODE = """
import sys
from open_mythos.__main__ import main
for line in sys.argv[1:]:
    print("$", line, file=sys.stderr)
    sys.argv = ["mythos", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
"""


def in_turn(*lines: str, said: str, here: Path, options: tuple[str, ...] = (), **env: str) -> tuple[str, str]:
    """Stdout and stderr of the commands; on stderr, a line with "$" and the command comes before the output of each.

    Args:
        lines: arguments of ``mythos``, one string for each command.
        said: standard input of all commands.
        here: working directory.
        options, env: options of Python, and environment variables.
    """
    env = os.environ | {"PYTHONPATH": str(Path(open_mythos.__file__).parent.parent)} | env
    call = [sys.executable, *options, "-c", _CODE, *lines]
    done = subprocess.run(call, cwd=here, input=said, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
