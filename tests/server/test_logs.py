"""Log lines stay lines, and a stream that cannot be written stops nothing."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading

import pytest
from helpers.fake_executor import fake_config
from real_server import RealServer, make_model, wait_until

from trimaran.core.log_lines import JsonFormatter, LogStyle, TextFormatter, escape
from trimaran.core.rank_link import Boot, Link, Report
from trimaran.platforms.interface import GroupSpec
from trimaran.server.logs import DroppingHandler


def record(message, *arguments, **extra):
    made = logging.LogRecord("trimaran.server.x", logging.INFO, "", 0, message, arguments, None)
    vars(made).update(extra)
    return made


NASTY = "a\r\nERROR forged\x1b[31mred\x00\u2028\x9b\ud800 ü"


def test_escaping():
    assert escape(NASTY) == r"a\x0d\x0aERROR forged\x1b[31mred\x00\u2028\x9b\ud800 ü"


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_record_is_one_printable_line(formatter):
    line = formatter.format(record("id %s", NASTY, request_id="r1"))
    assert len(line.splitlines()) == 1 and line.isprintable()
    assert "r1" in line and "server.x" in line


def test_json_lines():
    fields = json.loads(JsonFormatter().format(record("id %s", NASTY, request_id="r1")))
    assert fields["message"] == f"id {NASTY}" and fields["request_id"] == "r1"
    assert fields["level"] == "info"


def test_tracebacks_stay_on_the_line():
    try:
        raise ValueError(NASTY)
    except ValueError as error:
        made = record("failed")
        made.exc_info = (type(error), error, error.__traceback__)
    assert len(TextFormatter().format(made).splitlines()) == 1


def test_lines_reach_the_stream():
    stream = io.StringIO()
    handler = DroppingHandler(stream)
    handler.setFormatter(TextFormatter())
    handler.emit(record("one"))
    handler.emit(record("bad %d", "format"))
    assert handler.finish()
    assert "one" in stream.getvalue() and "unprintable" in stream.getvalue()
    assert handler.dropped == 0


def test_a_full_disk_is_counted():
    with open("/dev/full", "w", buffering=1) as full:
        handler = DroppingHandler(full)
        for number in range(3):
            handler.put(f"line {number}")
        assert handler.finish()
        assert handler.dropped >= 3
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_closed_stream_is_counted(stream):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    handler = DroppingHandler(stream)
    handler.put("line")
    assert handler.finish() and handler.dropped == 1


def test_a_pipe_that_nobody_reads_blocks_nobody():
    reading, writing = os.pipe()
    with open(writing, "w") as pipe:
        handler = DroppingHandler(pipe, capacity=100)
        # Should it block: once nobody can read any more, writing fails and goes on.
        rescue = threading.Timer(10, os.close, [reading])
        rescue.start()
        for _ in range(2_000):
            handler.put("x" * 2_000)
        assert not rescue.finished.is_set(), "it blocked"
        assert handler.dropped > 0
        assert not handler.finish(0.2)
        rescue.cancel()
        rescue.join()
        os.close(reading)  # the writer's thread gets a broken pipe
        assert handler.finish(5)
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
@pytest.mark.parametrize("name", ["trimaran", None])
def test_children_log_as_their_parent(formatter, name, monkeypatch):
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    monkeypatch.setattr(logging.getLogger("trimaran"), "handlers", [])
    monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
    assert LogStyle.of_this_process().json == isinstance(formatter, JsonFormatter)


def test_a_rank_logs_as_it_is_told(tmp_path):
    config = fake_config(tmp_path)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "trimaran.core.worker", str(theirs.fileno())]
    rank = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    theirs.close()
    boot = Boot(config, GroupSpec(1, 2, "file:///nowhere"), LogStyle(logging.WARNING, json=True))
    link = Link(ours)
    link.send(boot)
    assert link.receive(Report).state == "failed"
    lines = rank.communicate(timeout=60)[1].decode().splitlines()
    fields = json.loads(lines[-1])
    assert fields["level"] == "error" and "Traceback" in fields["message"]


@pytest.mark.real
@pytest.mark.parametrize("fault", [False, True])
def test_every_line_of_server_and_engine_is_json(tmp_path, fault):
    server = RealServer(
        make_model(tmp_path),
        "--log-format=json",
        *(["--max-model-len=9999999", "--log-level=debug"] if fault else []),
        stdout=subprocess.DEVNULL,
    )
    try:
        if fault:
            assert server.process.wait(60) == 1
        else:
            server.start()
            server.engine().kill()
            wait_until(lambda: "the engine died" in server.output())
        lines = [json.loads(line) for line in server.output().splitlines()]
    finally:
        server.close()
    loggers = {line["logger"] for line in lines}
    assert "core.engine.host" in loggers if fault else "executor" in loggers or "ops" in loggers
