"""One token's way, recorded while it runs, is the one that CONTRIBUTING tells."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import httpx

from trimaran.core.args import EngineArgs, ServerArgs
from trimaran.core.async_engine import AsyncEngine
from trimaran.server.app import create_app
from trimaran.server.router import EngineRouter, ServedModel

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"\| (\d+) \| `([^`]+)` `([^`]+)` \| [^|]+ \| ([^|]*) \|")
SHARED = re.compile(r"Entered from several rows: (.*?)\n\n", re.DOTALL)


class Recorder:
    """Which functions of ours were called, and from which file of ours, in order."""

    def __init__(self):
        self.on = False
        self.calls = []
        self.edges = set()
        self.names = {}

    def __call__(self, frame, event, _):
        if not self.on or event != "call":
            return
        code = frame.f_code
        file = self.file(code.co_filename)
        if file is None:
            return
        self.calls.append((file, code.co_qualname))
        caller = frame.f_back
        while caller is not None and self.file(caller.f_code.co_filename) is None:
            caller = caller.f_back
        if caller is not None:
            self.edges.add((self.file(caller.f_code.co_filename), file))

    def file(self, path):
        if path not in self.names:
            inside = path.startswith(f"{ROOT}/") and "/.venv/" not in path
            name = path[len(f"{ROOT}/") :] if inside else None
            self.names[path] = None if name and name.startswith("tests/") else name
        return self.names[path]


def table():
    """CONTRIBUTING's rows: (station file, function, files and folders beside it)."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = ROW.findall(text)
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return [(file, name, re.findall(r"`([^`]+)`", beside)) for _, file, name, beside in rows]


def shared():
    """The files that CONTRIBUTING lets several rows enter."""
    found = SHARED.search((ROOT / "CONTRIBUTING.md").read_text())
    return set(re.findall(r"`([^`]+)`", found.group(1)))


def row_of(file, rows):
    for number, (station, _, beside) in enumerate(rows):
        if file == station or file in beside:
            return number
    for number, (_, _, beside) in enumerate(rows):
        if any(place.endswith("/") and file.startswith(place) for place in beside):
            return number
    return None


async def record(model):
    """One chat request of one token through the server, the second of two."""
    recorder = Recorder()
    threading.setprofile(recorder)
    args = EngineArgs(model=model, max_model_len="256", max_num_seqs=2, platform="cpu")
    engine = AsyncEngine.from_args(args, in_process=True)
    try:
        await engine.start()
        served = ServedModel(engine, args)
        served.mark_ready()
        app, _ = create_app(EngineRouter(served), ServerArgs())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for recorded, content in ((False, "one"), (True, "another")):
                body = {
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": 1,
                    "temperature": 0,
                    "stream": True,
                }
                recorder.on = recorded
                sys.setprofile(recorder if recorded else None)
                response = await client.post("/v1/chat/completions", json=body)
                sys.setprofile(None)
                recorder.on = False
                assert response.text.endswith("data: [DONE]\n\n")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        await engine.close()
    return recorder


async def test_a_token_takes_the_way_that_contributing_tells():
    rows = table()
    assert len(rows) <= 10
    lines = sum(len((ROOT / file).read_text().splitlines()) for file, _, _ in rows)
    assert lines <= 3000
    recorder = await record("default")

    calls = iter(recorder.calls)
    for file, name, _ in rows:
        assert (file, name) in calls, f"{file} {name} did not run, or ran before its turn"

    unknown = {file for file, _ in recorder.calls if row_of(file, rows) is None} - shared()
    assert not unknown, f"ran for a token, but stand in no row: {sorted(unknown)}"

    # A station may be entered from anywhere in the row before; what is beside it only from its own.
    strays = {
        (caller, callee)
        for caller, callee in recorder.edges
        if callee not in shared()
        and callee not in {row[0] for row in rows}
        and caller not in shared()
        and row_of(caller, rows) != row_of(callee, rows)
    }
    assert not strays, f"entered from another row: {sorted(strays)}"
