"""One rank beyond the first: `python -m trimaran.core.worker FD`, started by `GroupExecutor` only.

It is told everything over the inherited socket FD. It ends with its parent: by the kernel's
signal, and by the end of the socket where that signal cannot reach.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys

from ..platforms.interface import DeviceLost
from .errors import EngineDeadError
from .executor import Rank
from .plan import StepPlan
from .rank_link import Boot, Link, LinkClosed, Report

logger = logging.getLogger("trimaran.worker")

_PR_SET_PDEATHSIG = 1


def main() -> int:
    _end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # the first rank decides when to end
        signal.signal(number, signal.SIG_IGN)
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    try:
        boot = link.receive(Boot)
        boot.log.apply()
        rank = Rank(boot.config, boot.group)
    except LinkClosed:
        return 0
    except Exception as error:
        logger.exception("this rank cannot start")
        link.send(Report("failed", error=f"{type(error).__name__}: {error}"))
        return 1
    try:
        _serve(rank, link)
    except LinkClosed:
        return 0
    finally:
        rank.close()
    return 0


def _serve(rank: Rank, link: Link) -> None:
    """Run every plan as it comes. Tokens are the same on each rank; the first one reports them."""
    link.send(Report("ready"))
    while True:
        plan = link.receive(StepPlan)
        try:
            error = rank.runner.submit(plan).result().error
        except (DeviceLost, EngineDeadError) as gone:
            link.send(Report("lost", plan.step_id, str(gone)))
            raise
        link.send(Report("step", plan.step_id, error))


def _end_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
