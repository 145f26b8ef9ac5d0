"""The process that renders templates nobody vouches for: `python -m …core.text.render_worker`.

Reads one JSON line a job (`source`, `variables`), writes one JSON line (`text` or `error`). The
kernel ends it when a job takes too long (an alarm with its default action, which also stops an
endless loop in C) and caps its memory; its parent sees the pipe close and starts another.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys

import jinja2

from .sandbox import describe, make_environment, render_bounded

MEMORY_BYTES = 512 * 1024 * 1024


def main() -> None:
    time_limit = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment = make_environment()
    compiled = functools.lru_cache(maxsize=16)(environment.from_string)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, time_limit)
        answer = _render(compiled, line)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def _render(compiled: functools._lru_cache_wrapper[jinja2.Template], line: bytes) -> bytes:
    try:
        job = json.loads(line)
        text = render_bounded(compiled(job["source"]), job["variables"])
        return json.dumps({"text": text}).encode()
    except Exception as error:  # whatever a hostile template makes of itself is its own error
        return json.dumps({"error": describe(error)[:1000]}).encode()


if __name__ == "__main__":
    main()
