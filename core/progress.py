"""A progress bar for long batches; nothing at all for short ones, or where nobody looks."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

SHOW_AFTER = 2.0  # seconds


class ProgressBar:
    """Counts finished requests and generated tokens. `total` None: how many is not known."""

    def __init__(self, total: int | None, *, enabled: bool = True) -> None:
        self._total = total
        self._enabled = enabled and sys.stderr.isatty()
        self._started = time.monotonic()
        self._requests = 0
        self._tokens = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, num_tokens: int) -> None:
        """One more request is finished, with so many generated tokens."""
        self._requests += 1
        self._tokens += num_tokens
        elapsed = time.monotonic() - self._started
        if not self._enabled or elapsed < SHOW_AFTER:
            return
        if self._bar is None:
            self._show()
        rate = f"{self._tokens / elapsed:,.0f} tokens/s"
        self._bar.update(self._task, completed=self._requests, rate=rate)

    def _show(self) -> None:
        from rich import progress  # lazy: only long batches on a terminal need it
        from rich.console import Console  # lazy: as above

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("requests", total=self._total, rate="")
        self._bar.start()
