"""A GPU box in one command: what it has, the conformance kit, the device tests, token parity.

    PYTHONPATH=DIR python benchmarks/gpu_row.py --out OUT [--platform cuda] [--part parity]

Nothing needs installing but torch, transformers and pytest: DIR holds a link called `trimaran` to
this checkout. Each part runs in a process of its own and leaves OUT/PART.json, and is not run
again while that file is there: a short lease is used bit by bit. Exit status 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PARTS = ("facts", "conform", "device", "parity")
FAMILIES = ("qwen3", "llama3", "mistral")


def command(part: str, platform: str, out: Path) -> list[str]:
    """What a part runs."""
    python = sys.executable
    if part == "facts":
        return [python, "-m", "trimaran", "platforms", "--platform", platform]
    if part == "conform":
        report = str(out / "conform-report.json")
        levels = ["--level", "L0,L1,L2,L3"]  # the upper ones serve, and want the server's packages
        return [python, "-m", "trimaran", "conform", "--platform", platform, *levels] + [
            "--report",
            report,
        ]
    if part == "device":
        return [
            python,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "device",
            "tests/device",
        ]
    return [python, str(Path(__file__).resolve()), "--parity", "--platform", platform]


def run_part(part: str, platform: str, out: Path, seconds: float) -> dict[str, object]:
    """Run a part; its verdict, the end of its output and how long it took."""
    paths = [str(CHECKOUT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command(part, platform, out),
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        status, output = done.returncode, done.stderr + done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = 124, f"stopped after {seconds:.0f} s\n{error.stdout or ''}"
    lines = output.splitlines()
    return {
        "part": part,
        "platform": platform,
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "tail": lines[-60:],
    }


def parity(platform: str) -> int:
    """Greedy tokens of tiny random models, each against `transformers` in fp32 on the host."""
    from helpers.engine_loop import greedy, open_loop
    from helpers.generate_reference import describe, greedy_cases

    failed = 0
    for family in FAMILIES:
        cases = greedy_cases(family, 16, 24)
        options = {"max_model_len": "128", "max_num_seqs": 8, "kv_cache_memory_bytes": "64M"}
        with open_loop(family, platform=platform, dtype="float32", **options) as loop:
            found = loop.run([greedy(str(i), case.prompt, 24) for i, case in enumerate(cases)])
        equal = sum(found[str(i), 0].tokens == case.tokens for i, case in enumerate(cases))
        print(f"{family}: {equal} of {len(cases)} prompts token-exact; {describe(cases)}")
        failed += equal != len(cases)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_row"))
    parser.add_argument("--part", choices=PARTS, action="append", help="only this (repeatable)")
    parser.add_argument("--seconds", type=float, default=500.0, help="the longest of one part")
    parser.add_argument("--parity", action="store_true", help=argparse.SUPPRESS)
    namespace = parser.parse_args()
    if namespace.parity:
        return parity(namespace.platform)
    namespace.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for part in namespace.part or PARTS:
        file = namespace.out / f"{part}.json"
        if not file.exists():
            found = run_part(part, namespace.platform, namespace.out, namespace.seconds)
            file.write_text(json.dumps(found, indent=1))
        rows.append(json.loads(file.read_text()))
    for row in rows:
        verdict = "ok" if row["status"] == 0 else f"FAILED ({row['status']})"
        last = row["tail"][-1] if row["tail"] else ""
        print(f"{row['part']:8} {verdict:12} {row['seconds']:7.1f} s  {last}")
    return int(any(row["status"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
