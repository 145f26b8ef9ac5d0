"""Prints some conversations of the closed world, to read what the model is taught."""

from __future__ import annotations

import argparse

from world import KIND_SHARES, Generator
from world_render import render_segments


def main() -> None:
    """Prints conversations of one kind, or of all kinds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("train", "dev", "eval"), default="train")
    parser.add_argument("--kind", choices=tuple(KIND_SHARES), default="")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = Generator(options.split, options.seed)
    for _ in range(options.count):
        conversation = generator.conversation(options.kind)
        print(f"=== {conversation.category}")
        print("".join(text for text, _ in render_segments(conversation)))


if __name__ == "__main__":
    main()
