"""Other processes that need not import everything anew: forks of a clean one that has."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lightning_zipit", "helpers.nets"])


class Done(NamedTuple):
    """A process that has ended."""

    code: int
    printed: str
    errors: str


def run(
    target: Callable[..., Any],
    arguments: Sequence[Sequence[Any]],
    folder: Path,
    environments: Sequence[Mapping[str, str]] = (),
    timeout: float = 300,
) -> list[Done]:
    """Call a function in processes of its own, at the same time.

    Args:
        target: a function of a module that can be imported.
        arguments: of each process.
        folder: the working folder.
        environments: what each process has in its environment beside what this one has.
        timeout: in seconds.
    """
    environments = environments or [{}] * len(arguments)
    printed = [folder.parent / f"{folder.name}-{number}" for number in range(len(arguments))]
    with pytest.MonkeyPatch.context() as patch:  # for the clean process, which is started by the first call
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        processes = [
            CONTEXT.Process(target=_call, args=(target, own, str(folder), {**os.environ, **extra}, str(path)))
            for own, extra, path in zip(arguments, environments, printed, strict=True)
        ]
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [
        Done(process.exitcode, Path(f"{path}.out").read_text(), Path(f"{path}.err").read_text())
        for process, path in zip(processes, printed, strict=True)
    ]


def _call(target: Callable[..., Any], arguments: Sequence[Any], folder: str, environment: dict[str, str], path: str):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{path}.{stream}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    try:
        target(*arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_ports(count: int) -> list[str]:
    """Ports of this machine that nobody listens to."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [str(listener.getsockname()[1]) for listener in listeners]
