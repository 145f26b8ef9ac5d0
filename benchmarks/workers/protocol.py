"""A peer runs in a process of its own and answers one JSON line for each JSON line it reads.

`{"op": "load", "model": dir, "dtype": …}` → `{"seconds": …}`; `{"op": "run", "prompts": …,
"outputs": …}` → `Measurement`; `{"op": "score", "prompts": …}` → the most probable next token of
each prompt and its log-probability, by which peers are checked against each other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(handlers: dict[str, Callable[..., Any]]) -> None:
    """Answer requests on the real stdout until stdin ends; stray prints go to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        answers.write(json.dumps(handlers[op](**request)) + "\n")
