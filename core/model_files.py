"""Where a model's files lie, and what its JSON files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .args import DEFAULT_MODEL
from .errors import ConfigError, ModelLoadError

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]

GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Name in generation_config.json → field of SamplingParams."""


def resolve_model_path(name: str, revision: str | None = None) -> Path:
    """The directory of a model: `default` is the one in the box; otherwise a directory, or a hub
    id, looked up in the local cache and then on the hub. Raises ModelLoadError."""
    if name == DEFAULT_MODEL:
        path = Path(__file__).resolve().parent.parent / "default_model"
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"The default model is not installed: {path} has no config.json.")
        return path
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"{path} is a file: give the directory that holds config.json.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelLoadError(
            f"There is no directory {path}, and {name!r} is no hub id (those look like org/model)."
        )
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    import huggingface_hub  # lazy: a second of start-up that a local directory does not need

    def fetch(local: bool) -> Path:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=local, allow_patterns=_HUB_PATTERNS
        )
        return Path(found)

    try:
        return fetch(local=True)
    except Exception:  # whatever is wrong with the cache, the hub may have it
        try:
            return fetch(local=False)
        except Exception as error:
            raise ModelLoadError(
                f"{name!r} is neither a directory nor in the local hub cache, and the hub did not "
                f"give it ({type(error).__name__}: {_first_line(error)})."
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelLoadError says what is wrong with it and where."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path.parent} has no {path.name}.") from None
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds {type(value).__name__}, not a JSON object.")
    return value


def read_hf_config(path: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """The config.json in the directory `path`, or the file `path`, with `overrides` merged over it
    (objects are merged key by key)."""
    path = path if path.is_file() else path / "config.json"
    config = _merge(read_json(path), overrides)
    if code := code_of(config):
        raise ModelLoadError(
            f"{path} wants code of its own to be run ({code}), and code that comes "
            "with a model is never run here. If one of the architectures that are served describes "
            "this model without it, take `auto_map` out, for instance with "
            "--hf-overrides '{\"auto_map\": null}'."
        )
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures):
        raise ModelLoadError(
            f"{path} names no `architectures`: it cannot be told how to run this "
            'model. Add them, or pass --hf-overrides \'{"architectures": ["…"]}\'.'
        )
    return config


def code_of(config: dict[str, Any]) -> str | None:
    """What `auto_map`, here or in a nested object, would have run; None if there is none."""
    found = config.get("auto_map")
    if found:
        return ", ".join(map(str, found.values())) if isinstance(found, dict) else str(found)
    nested = (value for value in config.values() if isinstance(value, dict))
    return next((code for value in nested if (code := code_of(value))), None)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value)
        merged[key] = value
    return merged


def read_generation(
    path: Path, source: str, overrides: dict[str, Any], hf_config: dict[str, Any]
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """(sampling defaults under the names of SamplingParams, ids that end a sequence).

    `source`: `auto` reads generation_config.json beside the model (it may be missing), `none`
    nothing, anything else is a directory. End-of-sequence ids are a fact of the model: those of
    its files hold whatever the source of the defaults.
    """
    beside = path / "generation_config.json"
    model_own = read_json(beside) if beside.is_file() else {}
    if source == "auto":
        defaults = model_own
    elif source == "none":
        defaults = {}
    else:
        defaults = read_json(Path(source).expanduser() / "generation_config.json")
    defaults = defaults | overrides
    ids: dict[int, None] = {}
    for value in (defaults, model_own, hf_config):
        ids |= dict.fromkeys(_eos_ids(value))
    found = {
        field: defaults[name]
        for name, field in GENERATION_FIELDS.items()
        if defaults.get(name) is not None
    }
    for field in GENERATION_FIELDS.values():  # an override may use our names as well
        if overrides.get(field) is not None:
            found[field] = overrides[field]
    return found, tuple(ids)


def _eos_ids(config: dict[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigError(f"eos_token_id is {value!r}: an id or a list of ids is wanted.")
    return ids
