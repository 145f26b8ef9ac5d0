"""The peers of a run: what each is called, its process, and how many fit into memory at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers
import psutil
import workloads

WORKERS = Path(__file__).parent / "workers"
# What each engine calls the precisions it is compared in; the first is its default.
PRECISIONS = {
    "trimaran": ("bf16", "int8", "int4"),
    "transformers": ("bf16",),
    "vllm_cpu": ("bf16",),
    "llama_cpp": ("bf16", "q8_0", "q4_0"),
    "openvino": ("bf16", "int8", "int4"),
}
# Unset: modules of a clone are compiled once, as those of an installed package are by pip, and not
# again at every start.
KEPT_BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}
CONVERTERS = {"llama_cpp": ("convert_gguf.py", ".gguf"), "openvino": ("convert_openvino.py", "")}
ONEDNN_ISA = {"avx2": "AVX2", "avx512": "AVX512_CORE"}
# Free memory to keep when a peer is started whose size is not known yet.
UNKNOWN_PEER_GIB = 7.0
MARGIN_GIB = 1.0


@dataclass(frozen=True)
class PeerSpec:
    """`ENGINE[:PRECISION][,OPTION=VALUE…]`; the options go to the engine as they stand."""

    name: str
    engine: str
    precision: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> PeerSpec:
        """Raises SystemExit with one line that says what is wrong and what there is."""
        head, *pairs = text.split(",")
        engine, _, precision = head.partition(":")
        if engine not in PRECISIONS:
            raise SystemExit(f"{text}: no engine {engine!r}; there are {', '.join(PRECISIONS)}.")
        known = PRECISIONS[engine]
        precision = precision or known[0]
        if precision not in known:
            raise SystemExit(f"{text}: {engine} runs in {', '.join(known)}, not {precision!r}.")
        options = {}
        for pair in pairs:
            key, separator, value = pair.partition("=")
            if not separator:
                raise SystemExit(f"{text}: {pair!r} should be OPTION=VALUE.")
            options[key] = _value(value)
        return cls(text, engine, precision, options)

    @property
    def is_ours(self) -> bool:
        return self.engine == "trimaran"

    @property
    def bits(self) -> int:
        """Bits of a weight, by which peers are held against each other."""
        return {"bf16": 16, "int8": 8, "q8_0": 8, "int4": 4, "q4_0": 4}[self.precision]

    @property
    def kv(self) -> str:
        """How the KV cache is kept: OpenVINO's CPU plugin takes 8 bits unless told otherwise."""
        if self.engine == "openvino":
            return "bf16" if self.bits == 16 or "KV_CACHE_PRECISION" in self.options else "int8"
        return "int8" if self.options.get("kv_cache_dtype") == "int8" else "bf16"

    def engine_options(self, isa: str | None = None) -> dict[str, Any]:
        options = dict(self.options)
        if self.engine == "openvino" and self.bits == 16:
            # 16 bits like every other peer's. bf16 where the processor computes in it.
            flags = Path("/proc/cpuinfo").read_text()
            native = "avx512_bf16" in flags and isa is None
            options.setdefault("KV_CACHE_PRECISION", "bf16" if native else "f16")
        if self.is_ours:
            options.setdefault("dtype", "bfloat16")
            if self.bits < 16:
                options["quantization"] = self.precision
        return options

    def environment(self, isa: str | None, threads: int, python: Path) -> dict[str, str]:
        """Variables of the worker's process: threads, no network, the cap, preloaded libraries."""
        variables = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | KEPT_BYTECODE
        if isa:
            # Torch's own loops; oneDNN in torch, vLLM and OpenVINO; our kernels. llama.cpp has no
            # such switch: it is built for the cap (peers.py).
            variables |= {"ATEN_CPU_CAPABILITY": isa, "ONEDNN_MAX_CPU_ISA": ONEDNN_ISA[isa]}
            variables["TRIMARAN_CPU_ISA"] = isa
        if self.engine == "vllm_cpu":  # its CPU page: tcmalloc and Intel's OpenMP, preloaded
            wanted = [*Path("/usr/lib/x86_64-linux-gnu").glob("libtcmalloc_minimal.so.4")]
            wanted += python.parent.parent.glob("lib/libiomp5.so")
            variables["LD_PRELOAD"] = ":".join(map(str, wanted))
        return variables


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class PeerFailed(Exception):
    """A worker ended; the message has the last lines of its log."""


@dataclass
class Setting:
    """What is the same for every peer of a run."""

    checkpoint: Path
    cache: Path
    threads: int
    kv_tokens: int
    max_len: int
    isa: str | None = None


class Peer:
    """One engine in a process of its own, which speaks `workers/protocol.py`."""

    def __init__(self, spec: PeerSpec, setting: Setting) -> None:
        self.spec, self.setting, self.name = spec, setting, spec.name
        self.python = peers.python_of(spec.engine, setting.isa, setting.cache)
        self.log = setting.cache / "logs" / f"{spec.name.replace('/', '_')}.log"
        self.variables = spec.environment(setting.isa, setting.threads, self.python)
        self.loaded: dict[str, Any] = {}
        self.peak_gib = 0.0
        self.is_warm = False
        self._process: subprocess.Popen[str] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def model(self) -> Path:
        """The checkpoint in the form and precision that this engine reads, converted once."""
        if self.spec.engine not in CONVERTERS:
            return self.setting.checkpoint
        script, ending = CONVERTERS[self.spec.engine]
        source = self.setting.checkpoint
        target = source.with_name(f"{source.name}-{self.spec.engine}-{self.spec.precision}{ending}")
        if not target.exists():
            command = [self.python, Path(__file__).with_name(script), source, self.spec.precision]
            with self._open_log() as log:
                done = subprocess.run([*command, target], stdout=log, stderr=log)
            if done.returncode:
                raise PeerFailed(f"{self.name}: {script} failed{self._last_words()}")
        return target

    def start(self) -> dict[str, Any]:
        """Start the process and load the model; raises PeerFailed."""
        model, self.is_warm = self.model, False
        with self._open_log() as log:
            self._process = subprocess.Popen(
                [str(self.python), str(WORKERS / f"{self.spec.engine}_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env={**os.environ, **self.variables},
                start_new_session=True,  # some engines have processes of their own: one group
            )
        self.loaded = self.ask(
            "load",
            model=str(model),
            threads=self.setting.threads,
            kv_tokens=self.setting.kv_tokens,
            max_len=self.setting.max_len,
            options=self.spec.engine_options(self.setting.isa),
        )
        return self.loaded

    def ask(self, op: str, **arguments: Any) -> Any:
        """One request to the worker and its answer; raises PeerFailed when it is dead."""
        assert self._process and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._process = None
            raise PeerFailed(f"{self.name} ended with {status} in {op!r}{self._last_words()}")
        return json.loads(line)

    def run(self, work: workloads.Workload, keep_prefix: bool = False) -> dict[str, Any]:
        found = self.ask("run", prompts=work.prompts, outputs=work.outputs, keep_prefix=keep_prefix)
        self.peak_gib = max(self.peak_gib, found["peak_rss_gib"])
        return found

    def close(self) -> None:
        """End the process: it stops at the end of its input, or is killed after a minute."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _open_log(self) -> Any:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return self.log.open("w")

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text().splitlines() if line.strip()]
        return f"; {self.log} ends:\n  " + "\n  ".join(lines[-4:])


@dataclass
class Fleet:
    """The peers of a run. Each is loaded once and idle while another runs, as long as all fit
    into memory; where they do not, the quickest to load again makes room, and is warmed up again.
    """

    peers: list[Peer]
    warm_up: Callable[[Peer], object]
    failed: dict[str, str] = field(default_factory=dict)

    def alive(self) -> list[Peer]:
        """The peers that did not fail so far."""
        return [peer for peer in self.peers if peer.name not in self.failed]

    def turn(self, peer: Peer, work: Callable[[Peer], Any]) -> Any:
        """`work` with a loaded and warm peer; None, and the reason kept, when it failed."""
        try:
            if not peer.is_running:
                self._make_room(peer)
                peer.start()
            if not peer.is_warm:
                self.warm_up(peer)
                peer.is_warm = True
            return work(peer)
        except PeerFailed as failure:
            self.failed[peer.name] = str(failure)
            return None

    def _make_room(self, peer: Peer) -> None:
        wanted = (peer.peak_gib or UNKNOWN_PEER_GIB) + MARGIN_GIB
        idle = sorted(
            (other for other in self.peers if other.is_running and other is not peer),
            key=lambda other: other.loaded["seconds"],
        )
        while idle and psutil.virtual_memory().available / 2**30 < wanted:
            idle.pop(0).close()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
