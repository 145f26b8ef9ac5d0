"""A parser whose errors are short: what is wrong, what was perhaps meant, and where to read on."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Its subcommands' parsers are of this class, too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Nothing unknown is handed up: this parser knows its own flags best."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return known, []

    def error(self, message: str) -> NoReturn:
        words = [self.prog]
        for one in self._get_positional_actions():
            name = one.metavar or one.dest
            words.append(f"{name}" if one.required else f"[{name}]")
        usage = f"usage: {' '.join(words)} [flags]; see {self.prog} --help"
        self.exit(2, f"{self.prog}: error: {message}\n{usage}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """A full or closed output is no failure; argparse of Python 3.11.2 takes it for one."""
        with contextlib.suppress(OSError):
            super()._print_message(message, file)

    def _meant(self, unknown: Sequence[str]) -> str:
        for word in unknown:
            flag = word.split("=")[0]
            if near := get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7):
                return f" (did you mean {near[0]}?)"
        return ""
