"""Write a checkpoint as OpenVINO IR with the weights in the precision that is asked for.

Run by the interpreter of the peer's environment (`peers.py`):

    PYTHON benchmarks/convert_openvino.py CHECKPOINT {bf16,int8,int4} TARGET

Optimum's exporter with its own defaults: int8 weights have one scale a row; int4 ones have a scale
and a zero point for each group of 128, the embedding and the head staying int8. 16-bit weights keep
the type of the checkpoint.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

WEIGHT_FORMATS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}  # bf16: "do not compress"


def main() -> int:
    checkpoint, precision, target = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino"]
    command += ["--model", checkpoint, "--task", "text-generation-with-past"]
    command += ["--weight-format", WEIGHT_FORMATS[precision], partial]
    status = subprocess.run(command).returncode
    if status == 0:
        partial.rename(target)
    return status


if __name__ == "__main__":
    sys.exit(main())
