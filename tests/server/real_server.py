"""`trimaran serve` in processes of its own, over a tiny random model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

HELPERS = Path(__file__).parents[1] / "helpers"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START_SECONDS = 90


def make_model(path):
    """A model of 512 tokens of context, with a byte-level tokenizer and a chat template."""
    sys.path.insert(0, str(HELPERS))
    import tiny_models
    import tiny_tokenizers

    tokenizer = tiny_tokenizers.byte_level()
    model = tiny_models.build("qwen3", vocab_size=tokenizer.get_vocab_size())
    model.save_pretrained(path)
    tiny_tokenizers.save(tokenizer, path, eos_token="</s>", bos_token="<s>", chat_template=TEMPLATE)
    return path


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def wait_until(condition, seconds=10.0, pause=0.02):
    """The first true value of `condition()`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "never happened"
        time.sleep(pause)
    return value


class RealServer:
    """A running server process; `start` waits until it answers."""

    def __init__(self, model, *flags, stdout=None, stderr=None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # Kept open: a request for the load takes a millisecond, a client of its own thirty.
        self.client = httpx.Client(base_url=self.url, timeout=5)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "trimaran", "serve", str(model), f"--port={self.port}"]
        self.process = subprocess.Popen(
            [*command, "--dtype=float32", "--num-threads=1", *flags],
            stdin=subprocess.DEVNULL,
            stdout=self.log if stdout is None else stdout,
            stderr=self.log if stderr is None else stderr,
        )

    def start(self):
        wait_until(lambda: self.healthy() or self.process.poll() is not None, START_SECONDS)
        assert self.process.poll() is None, self.output()
        return self

    def listening(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def healthy(self):
        return self.status("/health") == 200

    def status(self, path):
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(self.url + path, timeout=5).status_code
        return None

    def load(self):
        return self.client.get("/load").json()

    def complete(self, **body):
        values = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
        return httpx.post(self.url + "/v1/completions", json=values, timeout=60)

    def canary(self):
        """The same greedy tokens whatever happened before."""
        response = self.complete(max_tokens=8, return_token_ids=True)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["token_ids"]

    @contextlib.contextmanager
    def stream(self, **body):
        """An open stream of decoded events."""
        values = {"prompt": "hello", "max_tokens": 450, "ignore_eos": True, **body, "stream": True}
        request = ("POST", self.url + "/v1/completions")
        with httpx.stream(*request, json=values, timeout=60) as response:
            yield (
                response,
                (
                    json.loads(line[6:])
                    for line in response.iter_lines()
                    if line.startswith("data: {")
                ),
            )

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine(self):
        return next(one for one in self.children() if "process" in " ".join(one.cmdline()))

    def output(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def terminate(self, seconds=15):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def close(self):
        if self.process.poll() is None:
            for child in self.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self.process.kill()
            self.process.wait()
        self.client.close()
        self.log.close()


def gone(processes, seconds=5.0):
    """All of them have ended within `seconds`."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive


def broken_pipe():
    """The writing end of a pipe that nobody will ever read."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing
