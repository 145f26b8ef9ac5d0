"""From a model name to the engine that serves it. One engine today; more change nothing outside."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..core.args import EngineArgs
from ..core.async_engine import AsyncEngine
from ..core.engine.messages import EngineStats
from ..core.errors import EngineDeadError, ModelNotFoundError
from .errors import HTTPError


@dataclass
class ServedModel:
    """An engine, and the names that requests may call it by (the first is its own)."""

    engine: AsyncEngine
    args: EngineArgs = field(default_factory=EngineArgs)
    names: tuple[str, ...] = ()
    index: int = 0
    ready: bool = False
    down: bool = False  # its engine has died and does not run again yet
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0] if self.names else "loading"

    @property
    def max_model_len(self) -> int:
        return self.engine.model.max_model_len

    def stats(self) -> EngineStats:
        """What the engine said last; zeros while it loads or is dead."""
        return self.engine.stats() if self.ready else EngineStats()

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """`planned` and `actual` bytes by tag, of the engine's first rank; empty while it loads."""
        found: Mapping[str, Mapping[str, int]] = (
            self.engine.description.get("memory", {}) if self.ready else {}
        )
        return found

    def mark_ready(self) -> None:
        """The engine has started: its model is known now."""
        self.names = tuple(self.args.served_model_name) or (self.engine.model.name,)
        self.ready = True

    def check_health(self) -> None:
        """Raises `EngineDeadError` unless the engine takes requests."""
        if not self.ready:
            raise EngineDeadError("The model is still loading.")
        if self.down:
            raise EngineDeadError("The engine is being started again.")
        self.engine.health()


class EngineRouter:
    """Knows every served model. Raises `ModelNotFoundError` for names it does not know, and
    `EngineDeadError` for a model whose engine is gone."""

    def __init__(self, *models: ServedModel) -> None:
        self._models = list(models)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def resolve(self, name: str | None) -> ServedModel:
        """The model called `name`; with None, the only one there is."""
        loading = [model for model in self._models if not model.ready]
        if loading and not any(name in model.names for model in self._models if model.ready):
            raise HTTPError(
                503,
                "The model is still loading.",
                code="model_loading",
                headers={"retry-after": "2"},
            )
        for model in self._models:
            if name in model.names or (name is None and len(self._models) == 1):
                if model.down:
                    raise EngineDeadError("The engine is being started again.")
                return model
        known = ", ".join(f"`{model.name}`" for model in self._models)
        raise ModelNotFoundError(
            f"The model `{name}` is not served here; there is {known}.", param="model"
        )

    def check_health(self) -> None:
        for model in self._models:
            model.check_health()
