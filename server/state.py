"""What the handlers of one server share. No globals: two servers in a process stay apart."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.args import ServerArgs
from .metrics import Metrics
from .router import EngineRouter


@dataclass
class ServerState:
    router: EngineRouter
    args: ServerArgs
    metrics: Metrics = field(init=False)
    draining: bool = False
    num_in_flight: int = 0
    request_ids: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.router)
