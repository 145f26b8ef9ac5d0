"""A checkpoint on disk: safetensors, in one file or in shards named by an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ModelLoadError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """The tensors of a model directory by name, read lazily from mapped files.

    Raises ModelLoadError for files that are absent or corrupt, all of them at once.
    """

    def __init__(self, directory: Path) -> None:
        self._paths = _weight_files(directory)
        self._stack = ExitStack()
        self._slices: dict[str, Any] = {}
        self._map()

    def _map(self) -> None:
        problems = []
        for path in self._paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError, ValueError) as error:
                problems.append(f"{path}: {_diagnose(path, error)}")
                continue
            self._slices.update((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
        if problems:
            self.close()
            raise ModelLoadError(_listing("Weight files that cannot be read", problems))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._slices

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors writes it: BF16, F32, I8…"""
        return str(self._slices[name].get_dtype())

    def __getitem__(self, name: str) -> Any:
        """Indexing the result with slices reads just those elements, as a tensor."""
        return self._slices[name]

    def release(self) -> None:
        """Map the files anew: pages that were read stay in the process's resident memory for as
        long as the mapping they were read through."""
        self.close()
        self._map()

    def close(self) -> None:
        self._slices.clear()
        self._stack.close()


def _weight_files(directory: Path) -> list[Path]:
    """The files that make up the checkpoint, in the order of precedence of `transformers`."""
    if not directory.is_dir():
        raise ModelLoadError(f"{directory} is not a directory with a model.")
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return [single]
    if index.exists():
        return _indexed_files(index)
    # `consolidated*` are Mistral's own names for tensors that stand beside them again.
    files = sorted(directory.glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith("consolidated")]
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ModelLoadError(
            f"{directory} has its weights only as pickles ({', '.join(pickles)}), which can run "
            "code when read and are refused. Save them as safetensors, with "
            "`model.save_pretrained(…)` of transformers for example."
        )
    raise ModelLoadError(f"{directory} has no weights: neither {SINGLE} nor {INDEX}.")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map names no files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not an index of safetensors files: {error!r}.") from None
    foreign = sorted(name for name in names if Path(name).name != name)
    if foreign:
        raise ModelLoadError(_listing(f"{index} names files outside its directory", foreign))
    files = [index.parent / name for name in sorted(names)]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise ModelLoadError(_listing(f"{index} names files that are not there", absent))
    return files


def _diagnose(path: Path, error: Exception) -> str:
    """What is wrong with a safetensors file: lengths where they do not fit, else `error`."""
    # Whatever else is broken in the header, the reader's own words for it are in `error`.
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
            if head == LFS_POINTER:
                return "a git-lfs pointer instead of the file; run `git lfs pull` there"
            length = int.from_bytes(head[:8], "little")
            if size < 8 + max(length, 2):
                return f"{size} bytes are too few for its header; truncated?"
            file.seek(8)
            header = json.loads(file.read(length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
        if expected != size:
            return f"{size} bytes where its header promises {expected}; truncated or corrupt"
    return f"not a valid safetensors file ({error})"


def _listing(title: str, items: list[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {item}" for item in items)])
