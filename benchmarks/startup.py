"""Time from the command to the first answer of `trimaran serve`, imports and load included.

.venv/bin/python benchmarks/startup.py --rounds 5 --output benchmarks/results/startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import canary
import httpx
from fleet import KEPT_BYTECODE

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def one_start(arguments: list[str]) -> dict[str, float | str]:
    """Seconds until the server is ready, and until it has answered a chat request in full."""
    port = free_port()
    command = [sys.executable, "-m", "trimaran", "serve", "--port", str(port), *arguments]
    start = time.perf_counter()
    variables = {**os.environ, **KEPT_BYTECODE}
    silent = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=silent, stderr=silent, env=variables)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(timeout=30) as client:
            while True:
                if server.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended with {server.returncode}")
                try:
                    if client.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.01)  # the port is not open yet
                    continue
                time.sleep(0.01)
            ready = time.perf_counter() - start
            model = client.get(f"{url}/v1/models").json()["data"][0]["id"]
            answer = client.post(
                f"{url}/v1/chat/completions",
                json={"model": model, "max_tokens": 32, "temperature": 0, **QUESTION},
            ).json()
            seconds = time.perf_counter() - start
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
    text = answer["choices"][0]["message"]["content"]
    return {"ready_s": ready, "first_answer_s": seconds, "answer": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args, passed = parser.parse_known_args()
    starts = [one_start(passed) for _ in range(args.rounds)]
    seconds = [float(start["first_answer_s"]) for start in starts]
    report = {
        "command": " ".join(["benchmarks/startup.py", *sys.argv[1:]]),
        "machine": canary.describe_machine(),
        "first_answer_s": {
            "median": round(statistics.median(seconds), 3),
            "min": round(min(seconds), 3),
            "max": round(max(seconds), 3),
        },
        "starts": starts,
    }
    print(json.dumps(report["first_answer_s"]), starts[-1]["answer"])
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
