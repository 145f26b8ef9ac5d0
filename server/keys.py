"""The API keys that a server is started with, read before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from ..core.args import ServerArgs
from ..core.env import read_environment
from ..core.errors import ConfigError


def read_keys(args: ServerArgs) -> list[str]:
    """Keys of the flags, the file and the environment."""
    keys = [*args.api_key, *read_environment().api_keys]
    if args.api_key_file is not None:
        try:
            lines = Path(args.api_key_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {args.api_key_file}: {error}.") from None
        found = [line.strip() for line in lines if line.strip() and line[0] != "#"]
        if not found:
            raise ConfigError(f"--api-key-file {args.api_key_file} holds no key.")
        keys += found
    if any(not key.strip() for key in keys):
        raise ConfigError("--api-key: a key is empty.")
    return keys
