"""The command line: instant help, flags from dataclasses, clear errors."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import subprocess
import sys
import time

import pytest

from trimaran.cli import chat, complete, config_file, flags, main, platforms, serve, talk
from trimaran.cli.bench_serve import Trace, summarize
from trimaran.cli.http_client import Client, _refusal
from trimaran.cli.workload import make_jobs, percentile
from trimaran.core.args import EngineArgs, ServerArgs, flag_fields
from trimaran.core.engine.inproc import InprocClient
from trimaran.core.errors import ConfigError
from trimaran.core.llm import LLM

HEAVY = {"torch", "numpy", "pydantic", "starlette", "uvicorn", "rich", "transformers"}


def cli(*arguments, **options):
    command = [sys.executable, "-m", "trimaran", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("command", [[], *([name] for name in main.COMMANDS), ["bench", "serve"]])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\nfrom trimaran.cli.main import main\n"
        f"try: main({[*command, '--help']!r})\nexcept SystemExit as end: assert not end.code\n"
        f"print(sorted(set({sorted(HEAVY)!r}) & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: trimaran" in done.stdout


def test_help_is_fast():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert cli("serve", "--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.6, "0.3 s on an idle machine"


def test_every_field_is_a_flag():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    known = set(parser._option_string_actions)
    for field in [*flag_fields(ServerArgs), *flag_fields(EngineArgs)]:
        assert f"--{field.name.replace('_', '-')}" in known


def parsers(parser):
    for action in parser._actions:
        for sub in action.choices.values() if isinstance(action.choices, dict) else ():
            yield sub
            yield from parsers(sub)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_flag_has_a_help_text(command):
    for parser in parsers(main.parser(command)):
        for action in parser._option_string_actions.values():
            hidden_twin = action.option_strings == ["--model"]
            assert action.help and (action.help != argparse.SUPPRESS or hidden_twin), action


def parse(*arguments):
    namespace = main.parser("serve").parse_args(["serve", *arguments])
    serve.take_model(namespace)
    return flags.build(EngineArgs, namespace), flags.build(ServerArgs, namespace)


def test_defaults_and_values():
    assert parse() == (EngineArgs(), ServerArgs())
    engine, server = parse(
        "some/model",
        "--max-model-len=8k",
        "--served-model-name=a",
        "--served-model-name=b",
        "--no-enable-prefix-caching",
        '--override-generation-config={"top_k": 3}',
        "--gpu-memory-utilization=0.5",
        "--port=0",
        "--api-key=one",
        "--api-key=two",
        "--strict-params",
    )
    assert engine == EngineArgs(
        model="some/model",
        max_model_len="8k",
        served_model_name=["a", "b"],
        enable_prefix_caching=False,
        override_generation_config={"top_k": 3},
        gpu_memory_utilization=0.5,
    )
    assert server == ServerArgs(port=0, api_key=["one", "two"], strict_params=True)


def test_two_models_contradict():
    assert parse("--model", "a")[0].model == "a"
    assert parse("a", "--model", "a")[0].model == "a"
    with pytest.raises(ConfigError, match="Two models"):
        parse("a", "--model", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--porrt", "1"], "--porrt (did you mean --port?)"),
        (["serve", "--zzz"], "unknown arguments: --zzz\nusage: trimaran serve [MODEL] [flags]"),
        (
            ["bench", "serve", "--urll=a"],
            "trimaran bench serve: error: unknown arguments: --urll=a",
        ),
        (["bench"], "usage: trimaran bench KIND [flags]; see trimaran bench --help"),
        (["bench", "throughput", "--num-prompts=0"], "--num-prompts: 0 is not at least 1"),
        (["bench", "latency", "--input-len", "0"], "--input-len: 0 is not at least 1"),
        (["bench", "serve", "--range-ratio=nan"], "--range-ratio: nan is not in [0, 1]"),
        (["bench", "serve", "--vocab-size=a"], "invalid int value: 'a'"),
        (["serve", "--port", "many"], "invalid int value"),
        (["serve", "--dtype", "int3"], "invalid choice"),
        (["plan", "--quantization", "int3"], "--quantization: invalid choice: 'int3'"),
        (["serve", "--hf-overrides", "[1]"], "must be a JSON object"),
        (["serve", "--max-model", "8"], "--max-model"),
        (["sing"], "invalid choice"),
        ([], "required"),
    ],
)
def test_errors_name_the_flag(arguments, message):
    done = cli(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 2
    assert done.stderr.startswith("trimaran") and done.stderr.endswith(" --help\n")


def merged(path, *arguments):
    namespace = main.parser("serve").parse_args(["serve", *arguments])
    config_file.merge(namespace, str(path), EngineArgs, ServerArgs)
    return flags.build(EngineArgs, namespace), flags.build(ServerArgs, namespace)


def test_config_files(tmp_path):
    values = {"port": 9, "api-key": ["a"], "max-model-len": 8192, "seed": 3, "strict_params": True}
    (tmp_path / "a.json").write_text(json.dumps(values))
    engine, server = merged(tmp_path / "a.json", "--seed", "4")
    assert engine == EngineArgs(max_model_len="8192", seed=4), "the command line wins"
    assert server == ServerArgs(port=9, api_key=["a"], strict_params=True)
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text("port: 9\nshutdown-timeout: 5\napi_key: a\n")
    assert merged(tmp_path / "a.yaml")[1] == ServerArgs(port=9, shutdown_timeout=5.0, api_key=["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"porrt": 1}', "no flag `porrt`"),
        ('{"port": "many"}', "must be of type int"),
        ('{"port": true}', "must be of type int"),
        ('{"strict_params": 1}', "must be of type bool"),
        ("[1]", "must hold a mapping"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        merged(path)
    with pytest.raises(ConfigError, match="missing.json"):
        merged(tmp_path / "missing.json")


def test_an_error_is_one_line(tmp_path):
    done = cli("serve", "--config", str(tmp_path / "none.json"))
    assert done.returncode == 1
    assert done.stderr.startswith("trimaran: error: --config") and done.stderr.count("\n") == 1


def test_doctor_as_json():
    report = json.loads(cli("doctor", "--json").stdout)
    assert report["versions"]["trimaran"] and "cpu" in report["platforms"]


def test_doctor_remarks_what_a_platform_objects_to():
    environment = os.environ | {"TRIMARAN_CPU_ISA": "avx"}
    report = json.loads(cli("doctor", "--json", env=environment).stdout)
    assert any("TRIMARAN_CPU_ISA is 'avx'" in remark for remark in report["remarks"])
    done = cli("complete", "a", "--platform=cpu", env=environment)
    assert done.returncode == 1 and "TRIMARAN_CPU_ISA is 'avx'" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--platform=strict", "--dtype=float32"],
        ["--kv-cache-dtype=float16", '--hf-overrides={"intermediate_size": 512}'],
    ],
)
def test_platforms_shows_what_an_engine_binds(given):
    report = json.loads(cli("platforms", "--json", *given).stdout)
    shown = [(one["op"], one["signature"], one["chosen"]) for one in report["ops"]]
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    small = ["--max-num-seqs=2", "--max-model-len=64", "--load-format=dummy"]
    client = InprocClient.from_args(flags.build(EngineArgs, parser.parse_args([*small, *given])))
    try:
        bound = client.engine.executor._rank.binder.report()
        expected = [(one.op, platforms._signature(one.signature), one.chosen) for one in bound]
    finally:
        client.close()
    assert sorted(map(str, shown)) == sorted(map(str, expected))
    assert {"gather_rows", "sample", "attention"} <= {op for op, _, _ in shown}


def test_a_closed_output_is_no_failure():
    for target, *options in (("/dev/full",), ("/dev/full", "-u"), ("/dev/null",)):
        with open(target, "w") as out:
            command = [sys.executable, *options, "-m", "trimaran", "--version"]
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=60)
        assert b"Traceback" not in done.stderr


def test_what_a_model_writes_does_not_steer_the_terminal():
    assert talk.safe("a\x1b[2Jb\r\x07\x9b") == "a\ufffd[2Jb\ufffd\ufffd\ufffd"
    assert talk.safe("a\n\tü") == "a\n\tü"


@pytest.mark.parametrize(
    ("arguments", "piped", "message"),
    [
        (["complete", "a", "--temperature=nan"], "", "temperature is nan"),
        (["chat", "--top-p=2"], "", "top_p is 2.0"),
        (["complete", ""], "unread", "There is no prompt"),
        (["complete"], "", "There is no prompt"),
        (["complete", "-"], "", "There is no prompt"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_looked_for(arguments, piped, message):
    done = cli(*arguments, "--model=/nowhere", input=piped)
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize("arguments", [["a\nb"], ["-"], []])
def test_a_prompt_may_come_through_a_pipe(arguments, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb"))
    namespace = main.parser("complete").parse_args(["complete", *arguments])
    assert complete._prompt(namespace.prompt) == "a\nb"


def test_an_option_that_is_none_is_named():
    for name, meant in (("max_model_length", r" \(did you mean max_model_len\?\)"), ("foo", "")):
        with pytest.raises(ConfigError, match=f"There is no option {name}{meant}\\."):
            LLM("/nowhere", **{name: 1})


@pytest.mark.parametrize("last", ["/quit", "/exit"])
def test_commands_of_a_chat_are_not_for_the_model(last, monkeypatch, capsys):
    class Echo:
        name = "echo"

        async def chat(self, messages, options):
            yield f"<{messages[-1]['content']}>"

    lines = iter(["/help", "/halp", "/bin is full", last])
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(lines))
    with asyncio.Runner() as runner:
        chat._converse(runner, Echo(), [], {})
    assert next(lines, None) is None
    out, err = capsys.readouterr()
    assert out == "</bin is full>\n"
    err = " ".join(err.split())  # as wide as it was
    assert err.count(chat.HINT) == 3 and "There is no command /halp." in err


@pytest.mark.parametrize("command", [["chat", "--url=a"], ["bench", "serve"]])
def test_the_api_key_may_come_from_the_environment(command, monkeypatch):
    def key(*flags):
        namespace = main.parser(command[0]).parse_args([*command, *flags])
        return Client.from_flags(namespace).api_key

    monkeypatch.delenv("TRIMARAN_API_KEY", raising=False)
    assert key() is None
    monkeypatch.setenv("TRIMARAN_API_KEY", "one,two")
    assert key() == "one" and key("--api-key=three") == "three"


def test_a_refused_key_names_the_flag():
    refusal = _refusal(401, b'{"error": {"message": "No key."}}')
    assert refusal.message == (
        "The server answered 401: No key. Give one with --api-key, or in TRIMARAN_API_KEY."
    )


def test_workloads_are_reproducible():
    namespace = argparse.Namespace(
        num_prompts=5,
        input_len=10,
        output_len=20,
        range_ratio=0.5,
        shared_prefix_len=3,
        workload_seed=1,
    )
    jobs = make_jobs(namespace, 1_000)
    assert jobs == make_jobs(namespace, 1_000)
    assert len({tuple(job.prompt[:3]) for job in jobs}) == 1
    assert all(8 <= len(job.prompt) <= 18 and 10 <= job.output_len <= 30 for job in jobs)
    assert all(256 <= token < 1_000 for job in jobs for token in job.prompt)


def test_figures_of_a_serving_benchmark():
    usage = {"prompt_tokens": 4, "completion_tokens": 10}
    good = Trace(start=1.0, times=[1.5, 1.6, 1.9], usage=usage)
    result = summarize([good, Trace(error="refused")], seconds=2.0)
    assert result["failed"] == 1 and result["errors"] == "refused"
    assert result["output_tokens_per_second"] == 5.0, "counted by usage, not by events"
    assert result["ttft_ms_mean"] == pytest.approx(500)
    assert result["itl_ms_p99"] == pytest.approx(300)
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and percentile([], 0.5) == 0.0


def test_percentiles_are_nearest_ranks():
    values = list(range(1, 101))
    assert percentile(values, 0.99) == 99 and percentile(values, 0.5) == 50
    assert percentile([1, 2], 0.5) == 1 and percentile([], 0.5) == 0.0
    assert percentile([3], 0.0) == 3 and percentile(values, 1.0) == 100
