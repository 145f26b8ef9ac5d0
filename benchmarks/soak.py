"""Soak: a real server at saturation, 30 % of its clients vanishing, and nothing may be left over.

    .venv/bin/python benchmarks/soak.py --minutes 10 --output benchmarks/results/soak.json

The HTTP server runs in this process, so that its objects can be counted, the engine in its own and
the clients in a third. Load comes in rounds; after each the clients stop and the books are read:
KV blocks, open requests, Python objects, file descriptors, threads, shared memory, and resident
memory, for both processes. After a warm-up nothing but resident memory may differ from the
baseline, and that by less than 10 MB. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import canary
import psutil
import uvicorn
from rich.console import Console
from rich.progress import Progress

from trimaran.core.args import EngineArgs, ServerArgs
from trimaran.core.async_engine import AsyncEngine
from trimaran.server.app import create_app
from trimaran.server.router import EngineRouter, ServedModel

MEGABYTE = 1e6
# Caches that fill slowly (interned strings, regex, allocator arenas) may hold a few more objects.
OBJECT_SLACK = 500
console = Console(stderr=True)


class Server:
    """A server in this process, on a free port of the loopback."""

    def __init__(self, engine: AsyncEngine, args: EngineArgs) -> None:
        model = ServedModel(engine, args)
        model.mark_ready()
        app, self.state = create_app(EngineRouter(model), ServerArgs(port=0))
        self.name = model.name
        self.engine = engine
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False)
        self.uvicorn = uvicorn.Server(config)
        self.task = asyncio.create_task(self.uvicorn.serve(sockets=[self.socket]))

    async def close(self) -> None:
        self.uvicorn.should_exit = True
        await self.task
        await self.engine.close()


async def settle(server: Server, seconds: float = 10.0) -> None:
    """Wait until the engine has nothing left to do."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stats = await server.engine.check()
        if not (stats["num_running"] or stats["num_waiting"] or server.state.num_in_flight):
            return
        await asyncio.sleep(0.05)


async def books(server: Server) -> dict[str, Any]:
    """Everything that must come back to its baseline when no request is open."""
    await settle(server)
    await asyncio.sleep(1.5)  # closed connections and finished tasks are collected
    gc.collect()
    engine = await server.engine.check()
    ours = psutil.Process()
    child = next(p for p in ours.children() if "trimaran" in " ".join(p.cmdline()))
    record: dict[str, Any] = {
        "kv_used": engine["kv_used"],
        "num_running": engine["num_running"],
        "num_waiting": engine["num_waiting"],
        "open_requests": server.engine.num_unfinished + server.state.num_in_flight,
        "shm_files": sum(1 for _ in Path("/dev/shm").iterdir()),
        "engine_objects": engine["objects"],
        "server_objects": len(gc.get_objects()),
        "num_preemptions": engine["num_preemptions"],
        "generation_tokens": engine["generation_tokens"],
    }
    for name, process in (("engine", child), ("server", ours)):
        record[f"{name}_fds"] = process.num_fds()
        record[f"{name}_threads"] = process.num_threads()
        record[f"{name}_rss_mb"] = round(process.memory_info().rss / MEGABYTE, 2)
    return record


async def load(
    server: Server, args: argparse.Namespace, seconds: float, seed: int
) -> dict[str, int]:
    """One round of clients in their own process; the counts that they report."""
    clients = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("soak_clients.py")),
        *("--url", server.url, "--model", server.name, "--seconds", str(seconds)),
        *("--clients", str(args.clients), "--abort", str(args.abort), "--seed", str(seed)),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await clients.communicate()
    return dict(json.loads(out))


def faults(baseline: dict[str, Any], last: dict[str, Any], totals: dict[str, int]) -> list[str]:
    """What is not back at the baseline, in words; empty if the soak passed."""
    exact = ("kv_used", "num_running", "num_waiting", "open_requests", "shm_files")
    found = [f"{key}: {baseline[key]} → {last[key]}" for key in exact if last[key] != baseline[key]]
    for key in ("engine_fds", "server_fds", "engine_threads", "server_threads"):
        if last[key] > baseline[key]:
            found.append(f"{key}: {baseline[key]} → {last[key]}")
    for key in ("engine_objects", "server_objects"):
        if last[key] > baseline[key] + OBJECT_SLACK:
            found.append(f"{key}: {baseline[key]} → {last[key]}")
    for key in ("engine_rss_mb", "server_rss_mb"):
        if last[key] - baseline[key] >= 10:
            found.append(f"{key}: {baseline[key]} → {last[key]}")
    bad = {k: v for k, v in totals.items() if k.split()[0] in ("hung", "cut", "error", "transport")}
    return found + [f"clients saw {key}: {value}" for key, value in bad.items()]


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    engine_args = EngineArgs(
        model=args.model,
        max_num_seqs=16,
        max_model_len=args.max_model_len,
        # A pool too small for what runs at once, so that preemption is part of the soak.
        num_gpu_blocks_override=args.blocks,
    )
    engine = AsyncEngine.from_args(engine_args)
    await engine.start()
    server = Server(engine, engine_args)
    totals: dict[str, int] = {}
    samples = []
    rounds = max(1, round(args.minutes * 60 / args.round))
    try:
        # The bar's own thread must be there when the baseline is read.
        with Progress(console=console) as progress:
            task = progress.add_task("soak", total=rounds)
            await load(server, args, args.warm_up, seed=0)
            baseline = await books(server)
            for number in range(1, rounds + 1):
                counts = await load(server, args, args.round, seed=number)
                totals = {key: totals.get(key, 0) + counts.get(key, 0) for key in totals | counts}
                samples.append(await books(server))
                found = faults(baseline, samples[-1], {})
                progress.console.print(number, counts, "; ".join(found) or "at the baseline")
                progress.advance(task)
    finally:
        await server.close()
    return {
        "command": " ".join(["benchmarks/soak.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": canary.describe_machine(),
        "clients": totals,
        "baseline": baseline,
        "last": samples[-1],
        "faults": faults(baseline, samples[-1], totals),
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--round", type=float, default=60, help="seconds of load between readings")
    parser.add_argument("--warm-up", type=float, default=90, help="seconds before the baseline")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--abort", type=float, default=0.3, help="share of clients that vanish")
    parser.add_argument("--blocks", type=int, default=64, help="KV blocks of the engine")
    parser.add_argument("--max-model-len", default="1k")
    parser.add_argument("--model", default="default")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report = asyncio.run(soak(args))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(
        json.dumps(
            {key: report[key] for key in ("clients", "baseline", "last", "faults")}, indent=1
        )
    )
    sys.exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main()
