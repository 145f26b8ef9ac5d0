"""A whole step on a GPU: the step graph with neighbouring ops fused. What it launches depends on
shapes alone, so that the runner can record it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .gpu_fusion import fused
from .interface import StepFn, StepGraph
from .step_graph import StepRun

logger = logging.getLogger("trimaran.gpu")


def compile_step(graph: StepGraph) -> StepFn | None:
    """None, with the reason in the log, where no kernel takes over several of its ops."""
    nodes = fused(graph)
    if all(new is old for new, old in zip(nodes, graph.nodes, strict=True)):
        logger.info("steps run op by op: the portable kernels fuse none of their ops")
        return None

    def step(metadata: Sequence[Any], num_tokens: int) -> Tensor:
        return StepRun(graph, nodes, metadata, num_tokens).result()

    return step
