"""The server as its clients see it: the `openai` client and plain HTTP over a real connection."""

import concurrent.futures
import json
import logging

import openai
import pytest
from families import llama
from servers import (
    CHAT,
    COMPLETION,
    NAME,
    POSITIONS,
    complete,
    generated,
    prompt_of,
    serving,
    tiny_model,
    tokenizer,
    words,
)

import hf_rfa
from hf_rfa.errors import CheckpointError
from hf_rfa.serving.batch import Batch
from hf_rfa.serving.server import app_of
from hf_rfa.serving.settings import ServeSettings

# --- answers ---------------------------------------------------------------------------------------------------------


def test_one_request_gets_the_tokens_of_generate(client, model):
    answer = complete(client, prompt_of(90), 30)
    assert words(answer.choices[0].text) == generated(model, prompt_of(90), 30)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (90, 30, 120)
    assert answer.model == NAME


@pytest.mark.parametrize("original", [False, True], ids=["converted", "original"])
def test_32_requests_at_once_get_the_tokens_of_generate(original):
    model = tiny_model(original=original)
    lengths = [3 + 29 * number % 150 for number in range(32)]
    with serving(model, prefill_tokens=64) as server, server.openai() as client:
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            futures = [pool.submit(complete, client, prompt_of(n), 8 + n % 11) for n in lengths]
            answers = [words(future.result().choices[0].text) for future in futures]
        found = server.metrics()
    assert len(set(lengths)) == 32
    assert answers == [generated(model, prompt_of(n), 8 + n % 11) for n in lengths]
    # They were together in a batch: alone, each would have needed a step for each of its tokens.
    assert found["hf_rfa_steps_total"] < found["hf_rfa_generated_tokens_total"] / 3


def test_a_chat(client, model):
    messages = [{"role": "system", "content": "w20 w21"}, {"role": "user", "content": prompt_of(40)}]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=12, temperature=0)
    expected = generated(model, f"w9 w20 w21 w9 {prompt_of(40)} w10", 12)
    assert words(answer.choices[0].message.content) == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == 45


def test_an_answer_is_sent_back_as_it_came(client, model):
    messages = [{"role": "user", "content": "w20"}]
    first = client.chat.completions.create(model=NAME, messages=messages, max_tokens=4, temperature=0)
    messages += [first.choices[0].message, {"role": "user", "content": "w21"}]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=4, temperature=0)
    said = first.choices[0].message.content
    assert words(answer.choices[0].message.content) == generated(model, f"w9 w20 w9 {said} w9 w21 w10", 4)


def test_a_body_without_its_content_type_is_told_so(server):
    with server.http() as client:
        answer = client.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert "`Content-Type: application/json`. Got the content type 'text/plain'" in answer.json()["error"]["message"]


def test_content_in_parts_and_developers(client, model):
    parts = [{"type": "text", "text": "w30 "}, {"type": "text", "text": "w31"}]
    messages = [{"role": "developer", "content": parts}]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=5, temperature=0)
    assert words(answer.choices[0].message.content) == generated(model, "w9 w30 w31 w10", 5)


def test_token_ids_as_a_prompt(client, model):
    tokens = words(prompt_of(20))
    for prompt in (tokens, [tokens], [prompt_of(20)]):
        assert words(complete(client, prompt, 6).choices[0].text) == generated(model, prompt_of(20), 6)


def test_defaults_of_the_limit(client):
    messages = [{"role": "user", "content": prompt_of(POSITIONS - 40)}]
    assert client.completions.create(model=NAME, prompt="w3", temperature=0).usage.completion_tokens == 16
    assert client.chat.completions.create(model=NAME, messages=messages).usage.total_tokens == POSITIONS


def test_a_streamed_chat(client):
    messages = [{"role": "user", "content": prompt_of(40)}]
    options = {"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *chunks, usage = chunks
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert len(chunks) >= 12
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert usage.choices == []
    assert usage.usage == whole.usage
    assert len({chunk.id for chunk in [*chunks, usage]}) == 1


def test_a_streamed_completion(client):
    whole = complete(client, prompt_of(15), 9)
    chunks = list(complete(client, prompt_of(15), 9, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_is_server_sent_events(server):
    body = {"model": NAME, "prompt": "w3", "max_tokens": 2, "stream": True}
    with server.http() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "text_completion"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_stop_strings(client, model, stream, several):
    expected = generated(model, prompt_of(33), 20)
    last = next(token for token in expected[3:] if token > 12)
    stop = f"w{last}"
    answer = complete(client, prompt_of(33), 20, stop=["never", stop] if several else stop, stream=stream)
    pieces = list(answer) if stream else [answer]
    text = "".join(piece.choices[0].text for piece in pieces)
    assert words(text) == expected[: expected.index(last)]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_answer_and_temperature_another(client, model):
    answers = [complete(client, "w3", 20, temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    nucleus = complete(client, "w3", 20, temperature=1, top_p=1e-9)
    assert words(nucleus.choices[0].text) == generated(model, "w3", 20)


def test_the_token_that_ends_a_text_ends_an_answer(model):
    expected = generated(model, prompt_of(33), 20)
    last = expected[4]
    ending = tiny_model()
    ending.generation_config.eos_token_id = [last, 1]
    with serving(ending) as server, server.openai() as client:
        answer = complete(client, prompt_of(33), 20)
    assert answer.choices[0].finish_reason == "stop"
    assert words(answer.choices[0].text) == expected[: expected.index(last)]


def test_a_folder_without_a_tokenizer_says_so(model, tmp_path):
    hf_rfa.save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tokenizer that can be loaded.*\w\. Save the original's"):
        app_of(ServeSettings(folder=str(tmp_path)))


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_model_says_so(there, tmp_path):
    folder = tmp_path if there else tmp_path / "nothing"
    with pytest.raises((ValueError, CheckpointError), match=r"Unrecognized model in|is not a folder"):
        app_of(ServeSettings(folder=str(folder)))


# --- what else there is ----------------------------------------------------------------------------------------------


def test_models_and_health(client, server):
    assert [found.id for found in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with server.http() as plain:
        assert plain.get("/health").json() == {"status": "ok"}


def test_a_model_is_loaded_already(server):
    """What `transformers chat` asks first, and reads as server-sent events."""
    with server.http() as client:
        ready = client.post("/load_model", json={"model": NAME})
        error = client.post("/load_model", json={"model": "another"})
        assert client.post("/load_model", json={}).json()["error"]["param"] == "model"
    assert ready.headers["content-type"].startswith("text/event-stream")
    assert json.loads(ready.text.removeprefix("data: ")) == {"status": "ready", "model": NAME, "cached": True}
    found = json.loads(error.text.removeprefix("data: "))
    assert (found["status"], found["model"]) == ("error", "another")
    assert found["message"] == "There is no model 'another' here. Ask for 'tiny'."


def test_metrics(client, server):
    before = server.metrics()
    complete(client, prompt_of(21), 7)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="w3")
    after = server.metrics()

    def more(name):
        return after[name] - before.get(name, 0)

    assert more("hf_rfa_prompt_tokens_total") == 21
    assert more("hf_rfa_generated_tokens_total") == 7
    assert more('hf_rfa_requests_total{reason="length"}') == 1
    assert more('hf_rfa_http_responses_total{path="/v1/completions",status="200"}') == 1
    assert more('hf_rfa_http_responses_total{path="/v1/completions",status="404"}') == 1
    assert more("hf_rfa_time_to_first_token_seconds_count") == 1
    assert more("hf_rfa_time_per_token_seconds_count") == 6
    assert more("hf_rfa_request_seconds_count") == 1
    assert after["hf_rfa_batch_limit"] == 32
    assert after["hf_rfa_requests_running"] == after["hf_rfa_requests_waiting"] == after["hf_rfa_cache_bytes"] == 0


# --- clients that go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_client_has_gone_leaves_the_batch(model, stream, monkeypatch):
    slow_down(monkeypatch)
    with serving(model) as server, server.openai() as client, server.openai() as other:
        staying = complete(other, prompt_of(12), 60, stream=True)
        next(iter(staying))
        if stream:
            going = complete(client, prompt_of(12), 400, stream=True)
            next(iter(going))
            server.until(lambda found: found["hf_rfa_requests_running"] == 2)
            going.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                complete(client.with_options(timeout=0.3), prompt_of(12), 400)
        found = server.until(lambda found: found['hf_rfa_requests_total{reason="cancelled"}'] == 1)
        assert found["hf_rfa_generated_tokens_total"] < 100
        text = "".join(chunk.choices[0].text for chunk in staying)
        assert words(text) == generated(model, prompt_of(12), 60)[1:]
        server.until(lambda found: found["hf_rfa_requests_running"] == 0)


def slow_down(monkeypatch, seconds=0.02):
    """Let every step of a batch take some time, as it does with a model of some size."""
    import time

    own = Batch.step

    def step(self):
        time.sleep(seconds)
        return own(self)

    monkeypatch.setattr(Batch, "step", step)


# --- requests that wait, or have no template -------------------------------------------------------------------------


def test_a_model_without_a_chat_template(model):
    plain = tokenizer()
    plain.chat_template = None
    with serving(model, plain) as server, server.openai() as client:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model=NAME, messages=CHAT["messages"])
        assert complete(client, "w3", 2).usage.completion_tokens == 2


def test_more_requests_than_may_wait_are_told_when_to_come_back(model, monkeypatch):
    slow_down(monkeypatch)
    with serving(model, max_batch=2, max_waiting=2) as server, server.openai() as client:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(complete, client, prompt_of(9 + n), 60) for n in range(4)]
            server.until(lambda found: found["hf_rfa_requests_running"] + found["hf_rfa_requests_waiting"] == 4)
            with pytest.raises(openai.RateLimitError, match="2 requests wait already") as refused:
                complete(client, "w3", 2)
            answers = [words(future.result().choices[0].text) for future in futures]
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert answers == [generated(model, prompt_of(9 + n), 60) for n in range(4)]
        assert complete(client, "w3", 2).usage.completion_tokens == 2


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_crash_is_an_error_of_the_request_and_the_server_goes_on(stream, caplog):
    model = tiny_model()
    with serving(model) as server, server.openai() as client:
        layer = model.model.layers[1].mlp

        def crash(*_):
            raise RuntimeError("out of luck")

        hook = layer.register_forward_pre_hook(crash)
        with caplog.at_level(logging.CRITICAL), pytest.raises(openai.APIError, match="could not be computed") as error:
            list(complete(client, "w3 w4", 5, stream=stream))
        assert stream or error.value.status_code == 500
        assert "out of luck" not in str(error.value)  # what happened inside is the log's affair
        hook.remove()
        assert words(complete(client, "w3 w4", 5).choices[0].text) == generated(model, "w3 w4", 5)


def test_a_server_that_stops_lets_running_requests_end(model, monkeypatch):
    slow_down(monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with serving(model) as server:
            client = server.openai()
            future = pool.submit(complete, client, prompt_of(9), 50)
            server.until(lambda found: found["hf_rfa_requests_running"] == 1)
        assert words(future.result().choices[0].text) == generated(model, prompt_of(9), 50)
        with pytest.raises(openai.APIConnectionError):
            complete(client, "w3", 2)
        client.close()


def test_a_llama_whose_text_ends_where_its_tokenizer_says():
    model = llama(vocab_size=128, max_position_embeddings=64)
    own = tokenizer()
    own.eos_token = f"w{generated(model, 'w3', 3)[2]}"
    with serving(model, own) as server, server.openai() as client:
        assert complete(client, "w3", 9).usage.completion_tokens == 3
