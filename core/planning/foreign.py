"""Parameter shapes of architectures that have no family here, from `transformers`' own modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError


def foreign_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter → shape, by building the model without memory for it. ConfigError where this
    transformers does not know it either."""
    import transformers  # lazy: takes seconds, and only these models need it

    kind = config.get("model_type")
    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    # Only shapes are wanted; a quantized form would need packages that are not here.
    values.pop("quantization_config", None)
    try:
        described = transformers.AutoConfig.for_model(kind, **values)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(described)
    except Exception as error:  # whatever a foreign configuration makes it raise
        raise ConfigError(
            f"config.json: model_type={kind!r} has no family here, and transformers "
            f"{transformers.__version__} cannot describe it either ({error}).",
            param="model_type",
        ) from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
