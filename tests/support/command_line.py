"""Runs `sd3pipe` as a user does, in a process of its own, or in this one."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sd3pipe import cli
from support import forked as forks

_EMPTY = tempfile.TemporaryDirectory(prefix="sd3pipe-tests-")


def sd3pipe(
    *arguments: object, cwd: Path | None = None, expect: int = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one command line and checks its exit code; a failure shows what the command printed.

    Without `cwd` it runs in an empty folder, for the repository's own folder is a project, whose paths would fill in.
    """
    command = [sys.executable, "-m", "sd3pipe", *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=cwd or _EMPTY.name,
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert done.returncode == expect, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def forked(*arguments: object, cwd: Path | None = None, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """As `sd3pipe`, in a fork of this process, where libraries are imported already: their import takes seconds."""
    if not hasattr(os, "fork"):
        return sd3pipe(*arguments, cwd=cwd, expect=expect)
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:

        def act() -> None:
            os.chdir(cwd or _EMPTY.name)
            for number, file in ((1, out), (2, error)):
                os.dup2(file.fileno(), number)
            sys.stdin = open(os.devnull)  # noqa: SIM115 (until the process ends, as the next two)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            logging.getLogger().handlers.clear()  # those of the tests
            for module in [module for name, module in sys.modules.items() if name.startswith("sd3pipe.")]:
                for value in vars(module).values():
                    getattr(value, "cache_clear", int)()  # what was found out for a command's life
            code = cli.run(command)
            sys.stdout.flush()
            sys.stderr.flush()
            raise SystemExit(code)

        code = forks.exit_code(forks.start(act))
        out.seek(0)
        error.seek(0)
        done = subprocess.CompletedProcess(command, code, out.read().decode(), error.read().decode())
    assert done.returncode == expect, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def in_process(*arguments: object) -> None:
    """Runs one command line here, where libraries are imported already, in an empty folder: for what a test needs."""
    with contextlib.chdir(_EMPTY.name):
        assert cli.run([str(argument) for argument in arguments]) == 0


def report_of(out: Path) -> dict[str, Any]:
    """Returns the report that an encode stage or export wrote beside `out`."""
    return json.loads(Path(f"{out}.report.json").read_text(encoding="utf-8"))
