"""Orders of service. A policy is a sort key: the smallest key is served first, the largest among
the running is preempted first. Keys are unique, and fixed when a sequence enters the queue."""

from __future__ import annotations

from collections.abc import Callable

from .errors import ConfigError
from .request import Request

OrderKey = Callable[[Request], tuple[int, ...]]


def fcfs(request: Request) -> tuple[int, ...]:
    """First come, first served. A preempted sequence came before all that wait for a first turn."""
    return (request.arrival_order,)


def priority(request: Request) -> tuple[int, ...]:
    """Lower `priority` first, then by arrival."""
    return (request.priority, request.arrival_order)


def sjf(request: Request) -> tuple[int, ...]:
    """Shortest job first: fewest prompt tokens left, then by arrival; the preempted at the front,
    or a long job might never come back."""
    left = max(0, request.num_prompt - request.num_computed)
    return (0 if request.num_preemptions else left, request.arrival_order)


POLICIES: dict[str, OrderKey] = {"fcfs": fcfs, "priority": priority, "sjf": sjf}


def choose_policy(name: str) -> OrderKey:
    """Raises `ConfigError` naming the known policies."""
    if name not in POLICIES:
        known = ", ".join(POLICIES)
        raise ConfigError(f"unknown scheduling policy {name!r}; known: {known}", param="policy")
    return POLICIES[name]
