"""What the handlers of one server share. No globals: two servers in a process stay apart."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.args import ServerArgs
from ..core.errors import InvalidRequestError
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

    def claim_id(self, request_id: str) -> None:
        """Until it is given back by `request_ids.discard`, no other request may have it."""
        if request_id in self.request_ids:
            raise InvalidRequestError(
                "A request with this request_id is still running.", param="request_id"
            )
        self.request_ids.add(request_id)
