"""Runs an image that buildah built, without a container engine, and asks it: is it what its file
says? Its own entry point, user, health check and stop signal are used; the network is a fresh one
with nothing but a loopback, so that port 8000 is free and nothing is downloaded.

    python3 ci/docker/try_image.py localhost/trimaran:cpu          (as root)
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUILDAH = ("buildah", "--storage-driver", "vfs")
PORT = 8000
START_S, STOP_S = 180, 30
QUESTION, ANSWER = "What is the capital of France?", "Paris"
FRESH_NETWORK = "--in-fresh-network"
# Whoever wrote where the server's user may not write, or left something to compile, is named.
PROBE = """
import os, pathlib, shutil, trimaran
site = pathlib.Path(trimaran.__file__).parent
for place in ("/", "/opt", "/usr/bin", site):
    assert not os.access(place, os.W_OK), f"{place} can be written"
for place in (os.environ["XDG_CACHE_HOME"], os.environ["HF_HOME"], "/tmp"):
    os.makedirs(place, exist_ok=True)
    pathlib.Path(place, "probe").write_text("x")
    pathlib.Path(place, "probe").unlink()
for tool in ("gcc", "cc", "g++", "c++", "clang", "pip"):
    assert shutil.which(tool) is None, f"{tool} is in the image"
late = [p for p in site.rglob("*.py") if not any(p.parent.glob(f"__pycache__/{p.stem}.*.pyc"))]
assert not late, f"no bytecode of {late[0]}"
print("no compiler, no pip, bytecode of every module, only caches can be written")
"""


@dataclass(frozen=True)
class Image:
    """What the image says of itself."""

    user: str
    start: list[str]
    health: list[str]

    @classmethod
    def read(cls, name: str) -> Image:
        listing = json.loads(buildah("inspect", "--type", "image", name))
        config = listing["Docker"]["config"]
        kind, *health = config["Healthcheck"]["Test"]
        assert kind == "CMD", f"the health check goes through a shell: {kind}"
        return cls(config["User"], config["Entrypoint"] + (config.get("Cmd") or []), health)


def buildah(*arguments: str) -> str:
    return subprocess.run(
        [*BUILDAH, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def loopback_up() -> None:
    """In a fresh network namespace even 127.0.0.1 is down."""
    set_flags, up_and_running = 0x8914, 0x41
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, set_flags, struct.pack("16sh14x", b"lo", up_and_running))


@contextlib.contextmanager
def container_of(name: str) -> Iterator[str]:
    container = buildah("from", "--pull-never", name).strip()
    try:
        yield container
    finally:
        buildah("rm", container)


def command(container: str, arguments: list[str]) -> list[str]:
    return [*BUILDAH, "run", "--isolation", "chroot", container, "--", *arguments]


def descendants(pid: int) -> Iterator[int]:
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, tasks.read_text().split()):
                yield child
                yield from descendants(child)


def entry_process(outer: int, start: list[str]) -> int:
    """The entry point's process, seen from here: no namespace of processes lies between. It is the
    first below buildah's that runs what the image says, after the interpreter's name."""
    wanted = "\0".join(start[1:]).encode()
    for pid in descendants(outer):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if not line.startswith(b"buildah") and line.rstrip(b"\0").endswith(wanted):
                return pid
    raise LookupError(f"no process runs {' '.join(start)}")


def ask() -> str:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == 200, f"{response.status}: {text}"
    return str(json.loads(text)["choices"][0]["message"]["content"])


def healthy(container: str, image: Image) -> bool:
    result = subprocess.run(
        command(container, image.health), check=False, stderr=subprocess.DEVNULL
    )
    return result.returncode == 0


def serve_and_ask(container: str, image: Image) -> None:
    begun = time.monotonic()
    server = subprocess.Popen(command(container, image.start))
    try:
        while not healthy(container, image):
            assert server.poll() is None, f"the server ended with {server.returncode}"
            assert time.monotonic() - begun < START_S, f"not healthy within {START_S} s"
            time.sleep(0.2)
        print(f"healthy after {time.monotonic() - begun:.1f} s")
        answer = ask()
        print(f"{QUESTION} {answer}")
        assert ANSWER in answer
        pid = entry_process(server.pid, image.start)
        owner = os.stat(f"/proc/{pid}").st_uid
        assert owner == int(image.user.partition(":")[0]) != 0, f"runs as {owner}"
        begun = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        status = server.wait(STOP_S)
        print(f"SIGTERM: status {status} after {time.monotonic() - begun:.1f} s")
        assert status == 0
    finally:
        for pid in descendants(server.pid):
            os.kill(pid, signal.SIGKILL)
        server.wait(STOP_S)
    assert not healthy(container, image), "the health check passes without a server"


def main(name: str) -> None:
    image = Image.read(name)
    print(f"entry point: {' '.join(image.start)}")
    with container_of(name) as container:
        identity = subprocess.run(command(container, ["id"]), check=True, stdout=subprocess.PIPE)
        print(identity.stdout.decode().strip())
        assert b"uid=0" not in identity.stdout
        subprocess.run(command(container, ["python", "-c", PROBE]), check=True)
        assert not healthy(container, image), "the health check passes without a server"
        serve_and_ask(container, image)


if __name__ == "__main__":
    if FRESH_NETWORK in sys.argv:
        loopback_up()
        main(sys.argv[1])
    else:
        again = [sys.executable, __file__, sys.argv[1], FRESH_NETWORK]
        os.execvp("unshare", ["unshare", "--net", *again])
