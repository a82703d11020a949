"""Runs of pytest in processes that have torch and Pyro already, seconds faster than new ones.

Importing torch, Pyro, SciPy and ArviZ takes longer than most tests. The server imports them once
and forks for every run, so that a run imports only this package and the tests. Started as a script
it reads requests, one JSON object a line, and answers with exit codes.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.fx.experimental.proxy_tensor",
    "pyro",
    "pyro.infer",
    "pyro.infer.autoguide",
    "scipy.stats",
    "scipy.optimize",
    "scipy.integrate",
    "arviz",
    "_pytest.assertion",
    "pytest",
)
TIMED_OUT = 124


class ForkServer:
    """A process that holds the imports.

    Args:
        environment: Its environment variables, which runs inherit.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.close)

    def run(self, arguments: list[str], folder: Path, timeout: float) -> tuple[int, str]:
        """Runs pytest, with a folder as working directory and first on the path.

        Returns:
            The exit code (``TIMED_OUT`` after that many seconds), and what it printed.
        """
        request = {"arguments": arguments, "folder": str(folder), "timeout": timeout}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return code, (folder / "output.txt").read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """Lets it end."""
        self.process.communicate()


def serve() -> None:
    """Answers requests until there are no more."""
    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run_and_exit(request)
        print(_exit_code(child, request["timeout"]), flush=True)


def _run_and_exit(request: dict[str, Any]) -> None:
    """The forked process: never returns."""
    code = 3
    try:
        os.setsid()
        os.chdir(request["folder"])
        sys.path.insert(0, request["folder"])
        os.environ["PYTHONPATH"] = request["folder"]
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for own, shared in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(own, shared)
        import pytest  # what the server holds

        code = int(pytest.main(request["arguments"]))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _exit_code(child: int, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return TIMED_OUT


if __name__ == "__main__":
    serve()
