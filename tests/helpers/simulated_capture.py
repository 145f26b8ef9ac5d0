"""A device whose recordings are as blind as a card's: what was decided while recording stays.

While `capture` runs the work, nothing is computed. Each torch op and each kernel launch is kept
with its own tensors; what it makes has its shape and holds poison. A replay runs those calls again,
on the same memory, without any Python of ours, and leaves poison in all memory that was made while
recording. Asking for a value raises, as does a copy from or to the host; so does a replay that
reads memory which was freed meanwhile.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from helpers.stream_simulator import on_meta
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from trimaran.platforms.interface import Graph
from trimaran.platforms.strict_device import StrictDevice, poison

aten = torch.ops.aten
Call = Callable[..., Any]

HOST_READS = frozenset(
    {"tolist", "item", "numpy", "cpu", "equal", "allclose", "tensor", "as_tensor", "is_nonzero"}
    | {"__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "pin_memory"}
)
"""Calls that move values between device and host, by name: on host memory torch tells no mode of
some of them."""


class CaptureError(RuntimeError):
    """Work did what a recording cannot hold."""


_capturing = threading.local()


def current() -> Capture | None:
    """The capture that the calling thread is in."""
    return getattr(_capturing, "capture", None)


def launch(kernel: Call, *args: Any, **kwargs: Any) -> None:
    """Run a kernel, which writes into the tensors it is given; in a capture, keep the launch. Its
    Python is the kernel's own code, not the host's: it may read its tensors."""
    capture = current()
    if capture is None:
        kernel(*args, **kwargs)
    else:
        capture.keep(functools.partial(_run_kernel, kernel), args, kwargs)


def _run_kernel(kernel: Call, *args: Any, **kwargs: Any) -> None:
    kernel(*args, **kwargs)


class _Place:
    """A tensor that lies outside of the recording: by address, without keeping it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._weak = StorageWeakRef(tensor.untyped_storage())
        self._layout = tensor.storage_offset(), tensor.size(), tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor:
        if self._weak.expired():
            raise CaptureError("a replay reads or writes memory that was freed meanwhile")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._weak.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)


class Capture(TorchDispatchMode):
    """Keeps what the calling thread launches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.made: dict[int, Tensor] = {}
        """Memory made while recording, by its storage: the recording's own."""

    def keep(self, call: Call, args: Any, kwargs: Any, results: Any = ()) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        kept = [self._kept(leaf) for leaf in leaves]
        targets = tree_leaves(results)

        def again() -> None:
            given = [leaf.tensor() if isinstance(leaf, _Place) else leaf for leaf in kept]
            args, kwargs = spec.unflatten(given)
            found = tree_leaves(call(*args, **kwargs)) if targets else call(*args, **kwargs)
            for target, value in zip(targets, found if targets else (), strict=True):
                target.copy_(value)

        self.calls.append(again)

    def _kept(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.untyped_storage()._cdata in self.made:
            return leaf
        return _Place(leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.lift_fresh.default, aten._local_scalar_dense.default):
            raise CaptureError(f"{func} while recording: a value travels between host and device")
        if func._schema.is_mutable:
            self.keep(func, args, kwargs)
            target = kwargs.get("out", args[0])
            assert isinstance(target, Tensor) and len(func._schema.returns) == 1, func
            return target
        if any(one.alias_info is not None for one in func._schema.returns):  # a view
            return func(*args, **kwargs)
        results = self._results(func, args, kwargs)
        self.keep(func, args, kwargs, results)
        return results

    def _results(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Memory for what the op makes. What depends on values has no shape yet."""
        try:
            shapes = func(*on_meta(args), **on_meta(kwargs))
        except Exception as error:
            raise CaptureError(f"{func} while recording: {error}") from error
        return tree_map(self._make, shapes)

    def _make(self, shape: Any) -> Tensor:
        if not isinstance(shape, Tensor):
            raise CaptureError(f"an op yields {shape!r} to the host while recording")
        made = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
        self.made[made.untyped_storage()._cdata] = poison(made)
        return made


class _Blind(TorchFunctionMode):
    """The host sees no value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in HOST_READS:
            raise CaptureError(f"{name} while recording: a value travels between host and device")
        return func(*args, **(kwargs or {}))


class SimulatedGraph(Graph):
    def __init__(self, device: RecordingDevice, capture: Capture) -> None:
        self._device = device
        self._calls = capture.calls
        self._made = list(capture.made.values())

    def replay(self) -> None:
        self._device.expect_launch("replay")
        self._device.replays += 1
        for call in self._calls:
            call()
        for tensor in self._made:  # other recordings share the memory
            poison(tensor)


class RecordingDevice(StrictDevice):
    """`strict`, with recordings. `captures`, `replays`: how many there were."""

    def __init__(self, index: int, delay: float) -> None:
        super().__init__(index, delay)
        self.captures = self.replays = 0

    def capture(self, work: Callable[[], None]) -> Graph:
        self.expect_launch("capture")
        self.captures += 1
        capture = _capturing.capture = Capture()
        try:
            with _Blind(), capture:
                work()
        finally:
            _capturing.capture = None
        return SimulatedGraph(self, capture)

    def to_device(self, host: Tensor) -> Tensor:
        self._expect_no_capture("to_device")
        return super().to_device(host)

    def to_host(self, tensor: Tensor) -> Tensor:
        self._expect_no_capture("to_host")
        return super().to_host(tensor)

    def expect_launch(self, what: str) -> None:
        if not self._inside():
            raise RuntimeError(f"{what} outside a launch.")
        self._expect_no_capture(what)

    def _expect_no_capture(self, what: str) -> None:
        if current() is not None:
            raise CaptureError(f"{what} while recording")
