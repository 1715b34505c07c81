"""Commands in a process of their own, one after the other: what is imported once is waited for once."""

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
    """What commands print and what they say on the screen besides, there behind "$" and the line of each.

    Args:
        lines: of words after ``mythos``.
        said: by the user, to all of them.
        here: where they run.
        options, env: of Python, and variables of its environment.
    """
    env = os.environ | {"PYTHONPATH": str(Path(open_mythos.__file__).parent.parent)} | env
    call = [sys.executable, *options, "-c", _CODE, *lines]
    done = subprocess.run(call, cwd=here, input=said, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
