"""A platform whose module replaces something of the engine when it is imported."""

from __future__ import annotations

from trimaran.platforms import ops
from trimaran.platforms.strict import StrictPlatform

ops.EXACT = ops.Tolerance(0.0, 0.0)  # equal to what it was: harmless to the other tests


class ImportPatches(StrictPlatform):
    """A vendor's fix for what the engine, in his eyes, does wrong."""
