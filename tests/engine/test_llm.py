"""`LLM`: prompts of every form, streaming of very many, chats, beams, and a clean end."""

import subprocess
import sys
import textwrap

import psutil
import pytest
from helpers.dummy_model import dummy_args, make_dummy_model
from helpers.fake_executor import FakeExecutor, continuation, fake_config
from helpers.tiny_tokenizers import byte_level, save

from trimaran import LLM, BeamSearchParams, SamplingParams
from trimaran.core.engine.inproc import InprocClient
from trimaran.core.engine.messages import AbortRequests
from trimaran.core.errors import ConfigError, InvalidRequestError, ModelLoadError, StepError
from trimaran.core.llm import MIN_WINDOW

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_dummy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model):
    with LLM.from_engine_args(dummy_args(model)) as llm:
        yield llm
        assert llm.get_metrics()["kv_used"] == 0


@pytest.fixture
def fake(tmp_path):
    """An LLM around a fake executor, with limits as wanted."""
    save(byte_level(), tmp_path, eos_token="</s>")

    def build(executor=None, **scheduler):
        client = InprocClient(fake_config(tmp_path, **scheduler), executor or FakeExecutor())
        return LLM.from_client(client)

    return build


def test_a_prompt_is_text_ids_or_a_mapping_and_one_or_many(llm):
    ids = llm.get_tokenizer().encode("hello")
    forms = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids, "prompt": "hello"}]
    single = [llm.generate(form, GREEDY) for form in forms]
    assert all(len(outputs) == 1 for outputs in single)
    together = llm.generate(forms, GREEDY)
    streamed = list(llm.generate_iter(iter(forms), GREEDY))
    answers = {
        tuple(output.outputs[0].token_ids) for output in [*sum(single, []), *together, *streamed]
    }
    assert len(answers) == 1 and len(together) == len(streamed) == 4
    output = together[0]
    assert (output.prompt, output.prompt_token_ids, output.finished) == ("hello", ids, True)
    assert together[1].prompt is None and together[3].prompt == "hello"
    assert output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids)
    assert llm.generate([], GREEDY) == []


def test_parameters_for_all_for_each_or_the_models_own(llm):
    lengths = [len(o.outputs[0].token_ids) for o in llm.generate(["a", "b"], GREEDY)]
    assert lengths == [6, 6]
    each = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (2, 4)]
    outputs = llm.generate(["a", "b"], each)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [2, 4]
    with pytest.raises(InvalidRequestError, match="3 prompts but 2"):
        llm.generate(["a", "b", "c"], each)
    assert llm.generate("a")[0].finished
    assert llm.get_default_sampling_params() == SamplingParams()


def test_seeded_sampling_repeats_and_children_differ(llm):
    params = SamplingParams(max_tokens=12, seed=5, n=3, ignore_eos=True, logprobs=2)
    first, second = (llm.generate("hello", params)[0] for _ in range(2))
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 3
    assert [o.index for o in first.outputs] == [0, 1, 2]
    assert all(len(o.logprobs) == 12 for o in first.outputs)


def test_a_longer_answer_than_fits_is_cut_to_the_context(llm):
    params = SamplingParams(max_tokens=10_000, ignore_eos=True, temperature=0.0)
    (output,) = llm.generate([[5] * 1000], params)
    assert len(output.outputs[0].token_ids) == 24
    assert output.outputs[0].finish_reason == "length"


def test_chats_one_or_many(llm):
    chat = [{"role": "user", "content": "Hi"}]
    one = llm.chat(chat, GREEDY)
    two = llm.chat([chat, [*chat, {"role": "assistant", "content": "Yes"}, *chat]], GREEDY)
    assert len(one) == 1 and len(two) == 2
    assert one[0].prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert one[0].outputs[0].token_ids == two[0].outputs[0].token_ids
    other = llm.chat(chat, GREEDY, chat_template="{{ messages[0].content }}!{{ x }}",
                     chat_template_kwargs={"x": 1})  # fmt: skip
    assert other[0].prompt == "Hi!1"
    continued = [*chat, {"role": "assistant", "content": "Well"}]
    assert llm.chat(continued, GREEDY, continue_final_message=True)[0].prompt.endswith("Well")
    with pytest.raises(InvalidRequestError, match="role"):
        llm.chat([{}], GREEDY)
    assert llm.chat([], GREEDY) == []


def test_beams_best_first(llm):
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    first, second = llm.beam_search(["hello", "world"], params)
    for result in (first, second):
        scores = [beam.score for beam in result.sequences]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        assert all(len(beam.token_ids) == 5 for beam in result.sequences)


def test_a_search_scores_by_its_temperature(llm):
    """Dividing the logits divides the distances between log-probabilities."""

    def distances(temperature):
        params = BeamSearchParams(
            beam_width=3, max_tokens=1, temperature=temperature, ignore_eos=True
        )
        beams = llm.beam_search([[5, 6, 7]], params)[0].sequences
        return [beams[0].score - beam.score for beam in beams[1:]]

    plain = distances(1.0)
    assert plain[1] > 0
    assert distances(0.0) == pytest.approx(plain, abs=1e-5)
    assert all(gap > 1e20 for gap in distances(1e-50)), "next to 0 in fp32, and still finite"
    assert distances(4.0) == pytest.approx([gap / 4 for gap in plain], abs=1e-5)


@pytest.mark.parametrize("how", ["fail", "abort"])
def test_a_search_without_a_result_raises_and_frees_all(fake, how):
    def end(number, plan):
        if number == 2 and how == "fail":
            raise RuntimeError("the fuse blew")
        if number == 2:
            llm._client.send(AbortRequests(["0"]))

    with fake(FakeExecutor(on_submit=end)) as llm:
        params = BeamSearchParams(beam_width=2, max_tokens=8, ignore_eos=True)
        with pytest.raises(StepError, match="the fuse blew" if how == "fail" else "abort"):
            llm.beam_search([[5], [6]], params)
        assert llm.get_metrics()["kv_used"] == len(llm._processor) == len(llm._failures) == 0
        (result,) = llm.beam_search([[5]], params)
        assert all(len(beam.token_ids) == 8 for beam in result.sequences)


def test_enqueued_requests_wait_for_completion(llm):
    ids = llm.enqueue(["a", "b"], GREEDY) + llm.enqueue("c", GREEDY)
    outputs = llm.wait_for_completion()
    assert [output.request_id for output in outputs] == ids and len(set(ids)) == 3
    assert llm.wait_for_completion() == []
    with pytest.raises(InvalidRequestError):
        llm.enqueue([[10**6]])
    assert llm.wait_for_completion() == []


def test_a_bad_prompt_is_raised_and_the_rest_is_dropped(llm):
    prompts = ["a", "b", [10**6], "c"]
    with pytest.raises(InvalidRequestError, match="token ids"):
        llm.generate(prompts, SamplingParams(max_tokens=500, ignore_eos=True))
    assert llm.get_metrics()["num_running"] == llm.get_metrics()["kv_used"] == 0
    assert llm.generate("a", GREEDY)[0].finished


def test_the_model_can_be_asked_and_the_cache_dropped(llm):
    assert llm.reset_prefix_cache()
    long = [7] * 200
    assert llm.generate([long], GREEDY)[0].num_cached_tokens == 0
    assert llm.generate([long], GREEDY)[0].num_cached_tokens >= 160
    assert llm.reset_prefix_cache()
    assert llm.generate([long], GREEDY)[0].num_cached_tokens == 0
    (name,) = llm.apply_model(lambda model: type(model).__name__)
    assert name == "Decoder"


def test_prompts_stream_through_a_bounded_window(fake):
    taken = 0

    def prompts():
        nonlocal taken
        for number in range(5_000):
            taken += 1
            yield [5 + number % 200, 6]

    with fake() as llm:
        params = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
        for number, output in enumerate(llm.generate_iter(prompts(), params)):
            assert taken - number <= MIN_WINDOW + 1  # the next one is looked at
            assert output.outputs[0].token_ids == continuation(output.prompt_token_ids, 2)
            assert len(llm._results) < MIN_WINDOW and len(llm._processor) < MIN_WINDOW
        assert number == 4_999 and taken == 5_000


def test_a_window_never_overfills_the_queue(fake):
    with fake(max_num_queued_reqs=3, max_num_seqs=1, max_num_queued_tokens=40) as llm:
        prompts = [[5 + i] * (1 + i % 30) for i in range(40)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
        assert [output.prompt_token_ids for output in outputs] == prompts


def test_leaving_early_aborts_the_rest_and_frees_it(fake):
    with fake(run_ahead=1) as llm:
        endless = SamplingParams(max_tokens=200, ignore_eos=True)
        prompts = [[5 + i] for i in range(30)]
        params = [SamplingParams(max_tokens=1, ignore_eos=True)] + [endless] * 29
        stream = llm.generate_iter(prompts, params)
        assert next(stream).outputs[0].finish_reason == "length"
        stream.close()
        metrics = llm.get_metrics()
        assert metrics["kv_used"] == metrics["num_running"] == metrics["num_waiting"] == 0
        assert len(llm._processor) == len(llm._results) == 0
        (again,) = llm.generate([[5]], SamplingParams(max_tokens=3, ignore_eos=True))
        assert again.outputs[0].token_ids == continuation([5], 3)


def test_two_streams_at_once_keep_their_own(fake):
    with fake() as llm:
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        left, right = (llm.generate_iter([[x, i] for i in range(9)], params) for x in (5, 6))
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert (a.prompt_token_ids, b.prompt_token_ids) == ([5, i], [6, i])


def test_an_interrupt_leaves_a_usable_engine(fake):
    def interrupt(number, plan):
        if number == 5:
            raise KeyboardInterrupt

    with fake(FakeExecutor(on_submit=interrupt), run_ahead=1) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5], [6]], SamplingParams(max_tokens=50, ignore_eos=True))
        assert llm.get_metrics()["kv_used"] == 0
        assert llm.generate([[7]], SamplingParams(max_tokens=2))[0].finished


def test_sizes_may_be_numbers_and_faults_are_named(model, tmp_path):
    with LLM(str(model), load_format="dummy", dtype="float32", max_model_len=64,
             num_gpu_blocks_override=16) as llm:  # fmt: skip
        assert len(llm.generate([[5] * 60], GREEDY)[0].outputs[0].token_ids) == 4
    with pytest.raises(ModelLoadError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"no option max_tokens\."):
        LLM(str(model), max_tokens=5)
    with pytest.raises(ConfigError):
        LLM(str(model), load_format="dummy", max_model_len="many")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    make_dummy_model(tmp_path, vocab_size=128)
    with pytest.raises(ModelLoadError, match="another model"):
        LLM.from_engine_args(dummy_args(tmp_path))


def test_two_engines_in_one_process(model, llm):
    with LLM.from_engine_args(dummy_args(model, max_num_seqs=2)) as other:
        mine = llm.generate_iter(["hello"] * 3, GREEDY)
        theirs = other.generate_iter(["hello"] * 3, GREEDY)
        for a, b in zip(mine, theirs, strict=True):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids


@pytest.mark.real
def test_server_packages_are_not_needed(model):
    code = f"""
        import sys
        for name in ("zmq", "msgspec", "fastapi", "uvicorn", "pydantic", "prometheus_client"):
            sys.modules[name] = None  # importing it fails
        from trimaran import LLM, SamplingParams
        with LLM({str(model)!r}, load_format="dummy", dtype="float32", max_model_len=64,
                 num_gpu_blocks_override=16) as llm:
            print(len(llm.generate("hello", SamplingParams(max_tokens=3))))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "1", done.stderr


def test_leaving_the_context_frees_every_process_and_file(model):
    me = psutil.Process()
    fds, children = me.num_fds(), me.children()
    with LLM.from_engine_args(dummy_args(model)) as llm:
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY, chat_template="x")
    assert me.num_fds() <= fds and me.children() == children


def test_the_default_model_answers():
    with LLM() as llm:
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        (output,) = llm.chat(chat, SamplingParams(max_tokens=32, temperature=0.0))
        (sequence,) = output.outputs
        assert sequence.text.strip() and sequence.finish_reason == "stop"
        assert "<|" not in sequence.text and "\ufffd" not in sequence.text
        assert llm.get_tokenizer().decode(output.prompt_token_ids).endswith("assistant\n")


def test_a_request_that_leaves_itself_no_token_reads_that_and_not_of_the_model(llm):
    (letter,) = llm.get_tokenizer().encode("a", add_special_tokens=False)
    params = SamplingParams(allowed_token_ids=[letter], bad_words=["aa"], ignore_eos=True)
    (output,) = llm.generate("hello", params)
    (sequence,) = output.outputs
    assert (sequence.token_ids, sequence.finish_reason) == ([letter], "error")
    assert "leave no token" in sequence.stop_reason
