"""The server as its clients see it: the `openai` client and plain HTTP over a real connection."""

import concurrent.futures
import json
import logging

import openai
import pytest
from families import llama
from servers import NAME, POSITIONS, generated, prompt_of, serving, tiny_model, tokenizer, words
from transformers import GenerationConfig

import hf_rfa
from hf_rfa.errors import CheckpointError
from hf_rfa.serving.batch import Batch
from hf_rfa.serving.server import app_of
from hf_rfa.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def server(model):
    with serving(model, prefill_tokens=64) as running:
        yield running


@pytest.fixture
def client(server):
    with server.openai() as found:
        yield found


def complete(client, text, count, **options):
    return client.completions.create(
        **{"model": NAME, "prompt": text, "max_tokens": count, "temperature": 0, **options}
    )


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


def chat_by(client, generation_config, **options):
    """An answer with the settings that `transformers chat` sends."""
    messages = [{"role": "user", "content": prompt_of(40)}]
    body = {"generation_config": generation_config.to_json_string()}
    return client.chat.completions.create(model=NAME, messages=messages, extra_body=body, **options).choices[0]


def test_a_generation_config_chooses_as_generate_does(client, model):
    text = f"w9 {prompt_of(40)} w10"
    greedy = generated(model, text, 12)
    for config in (GenerationConfig(max_new_tokens=12), GenerationConfig(max_new_tokens=12, do_sample=False)):
        assert words(chat_by(client, config).message.content) == greedy
    drawn = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=1.5)
    assert words(chat_by(client, drawn).message.content) != greedy
    drawn.update(top_k=1)
    assert words(chat_by(client, drawn).message.content) == greedy
    drawn.update(top_k=None, top_p=0.0)
    assert words(chat_by(client, drawn).message.content) == greedy


def test_a_generation_config_ends_answers(client, model):
    text = f"w9 {prompt_of(40)} w10"
    greedy = generated(model, text, 12)
    place = next(n for n in range(3, 12) if greedy[n] not in greedy[:n])
    for end in (greedy[place], [1, greedy[place]]):
        answer = chat_by(client, GenerationConfig(max_new_tokens=12, eos_token_id=end))
        assert (words(answer.message.content), answer.finish_reason) == (greedy[:place], "stop")
    answer = chat_by(client, GenerationConfig(max_new_tokens=12, stop_strings=[f" w{greedy[place]}"]))
    assert (words(answer.message.content), answer.finish_reason) == (greedy[:place], "stop")


def test_fields_of_the_request_come_before_those_of_its_generation_config(client, model):
    greedy = generated(model, f"w9 {prompt_of(40)} w10", 12)
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=1.5)
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = chat_by(client, config, temperature=0, **{limit: 7})
        assert words(answer.message.content) == greedy[:7]


def test_what_real_generation_configs_hold_besides_is_taken(server):
    config = {
        "_from_model_config": True, "transformers_version": "5.24.0", "bos_token_id": 1, "pad_token_id": 0,
        "eos_token_id": [2, 3], "use_cache": True, "num_beams": 1, "repetition_penalty": 1.0, "max_length": 4096,
        "max_new_tokens": 2, "do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.7,
        "cache_implementation": "hybrid",
    }  # fmt: skip
    with server.http() as client:
        answer = client.post("/v1/chat/completions", json=CHAT | {"generation_config": json.dumps(config)})
        assert client.post("/v1/chat/completions", json=CHAT | {"generation_config": None}).status_code == 200
    assert answer.status_code == 200, answer.text


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


# --- requests that are refused ---------------------------------------------------------------------------------------

COMPLETION = {"model": NAME, "prompt": "w3", "max_tokens": 2}
JSON = {"Content-Type": "application/json"}  # httpx cannot write halves of characters
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "w3"}], "max_tokens": 2}
NESTED = json.loads(500 * "[" + 500 * "]")


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"prompt": ""}, 400, "`prompt` is empty"),
        ({"prompt": []}, 400, "`prompt` is empty"),
        ({"prompt": ["w3", "w4"]}, 400, "`prompt` may be one text. Got 2"),
        ({"prompt": [3, 128]}, 400, "has the token 128. The model knows 0 to 127"),
        ({"prompt": [-1]}, 400, "greater than or equal to 0"),
        ({"prompt": prompt_of(POSITIONS)}, 400, "context is 512 tokens. Got 512 in the prompt and 2 to generate"),
        ({"max_tokens": POSITIONS}, 400, "context is 512 tokens. Got 1 in the prompt and 512 to generate"),
        ({"max_tokens": 0}, 400, "`max_tokens`: Input should be greater than or equal to 1"),
        ({"max_tokens": "2"}, 400, "`max_tokens`: Input should be a valid integer"),
        ({"temperature": 3}, 400, "`temperature`: Input should be less than or equal to 2"),
        ({"top_p": -1}, 400, "`top_p`"),
        ({"n": 2}, 400, "`n` is not supported. Got 2. Send one request for each answer"),
        ({"best_of": 2}, 400, "`best_of` is not supported"),
        ({"logprobs": 5}, 400, "`logprobs` is not supported. Got 5"),
        ({"echo": True}, 400, "`echo` is not supported"),
        ({"logit_bias": {"3": 1}}, 400, "`logit_bias` is not supported"),
        ({"best": 5}, 400, "`best` is unknown"),
        ({"str": 5}, 400, "`str` is unknown"),  # a field may be called as one of pydantic's kinds
        ({"a[b": 5}, 400, "`a[b` is unknown"),
        ({"top_k": -1}, 400, "`top_k`: Input should be greater than or equal to 0"),
        ({"eos_token_id": [3, "w4"]}, 400, "`eos_token_id.1`: Input should be a valid integer"),
        ({"eos_token_id": "w4"}, 400, "`eos_token_id`: Input should be a valid integer"),
        ({"eos_token_id": -1}, 400, "`eos_token_id`: Input should be greater than or equal to 0"),
        ({"eos_token_id": [-1]}, 400, "`eos_token_id.0`: Input should be greater than or equal to 0"),
        ({"eos_token_id": 128}, 400, "`eos_token_id` has the token 128. The model knows 0 to 127"),
        ({"eos_token_id": [3, 10**400]}, 400, "`eos_token_id` has the token 1000"),
        ({"n": NESTED}, 400, "`n` is not supported. Got [[[[...]]]]. Send"),
        ({"stop": ""}, 400, "`stop`"),
        ({"stop": 17 * ["w3"]}, 400, "`stop`: List should have at most 16 items"),
        ({"stop": 1001 * "w"}, 400, "`stop`: String should have at most 1000 characters"),
        ({"prompt": "w3 \ud800"}, 400, "half of a character"),
        ({"prompt": ["\udfff"]}, 400, "half of a character"),
        ({"model": "\ud800"}, 400, "half of a character"),
        ({"stream_options": {"include_usage": True}}, 400, "`stream_options` belongs to streamed answers"),
        ({"model": "another"}, 404, "no model 'another' here. Ask for 'tiny'"),
        ({"model": None}, 400, "`model`"),
    ],
)
def test_requests_that_are_refused(server, changes, status, message):
    with server.http() as client:
        answer = client.post("/v1/completions", content=json.dumps(COMPLETION | changes), headers=JSON)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "`messages`: List should have at least 1 item"),
        ({"messages": [{"role": "nobody", "content": "w3"}]}, "`messages.0.role`"),
        ({"messages": [{"role": "tool", "content": "w3"}]}, "chat template refuses these messages: No tools here"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "`messages.0.content"),
        ({"messages": [{"role": "user", "content": prompt_of(POSITIONS)}]}, "context is 512 tokens. Got 514"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a character"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "half of a character"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "`messages.0.tool_calls` is unknown"),
        ({"tools": [{"type": "function"}]}, "`tools` is not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({"max_completion_tokens": 3}, "old name of `max_completion_tokens`"),
        ({"generation_config": "{"}, "must be the JSON of an object, as `GenerationConfig.to_json_string()` writes"),
        ({"generation_config": {"do_sample": False}}, "in a string. Got {'do_sample': False}"),
        ({"generation_config": "[3]"}, "Got '[3]'"),
        ({"generation_config": '{"do_sample": 1}'}, "`generation_config.do_sample`: Input should be a valid boolean"),
        ({"generation_config": '{"num_beams": 4}'}, "`generation_config.num_beams` is not supported. Got 4. Set it"),
        ({"generation_config": '{"repetition_penalty": 1.1}'}, "`generation_config.repetition_penalty` is not supp"),
        ({"generation_config": '{"max_length": 20}'}, "`generation_config.max_length` is not supported. Got 20. Set"),
        ({"generation_config": '{"no_such": 1}'}, "`generation_config.no_such` is not supported. Got 1."),
        ({"generation_config": '{"temperature": 3}'}, "`generation_config.temperature`: Input should be less than"),
        ({"generation_config": '{"temperature": NaN}'}, "`generation_config.temperature`: Input should be less than"),
        ({"generation_config": '{"max_new_tokens": Infinity}'}, "`generation_config.max_new_tokens`: Input should be"),
        ({"generation_config": '{"max_new_tokens": 0}'}, "`generation_config.max_new_tokens`: Input should be"),
        ({"generation_config": '{"stop_strings": ["a", ""]}'}, "`generation_config.stop_strings.1`: String should"),
        ({"generation_config": '{"stop_strings": {"a": 1}}'}, "`generation_config.stop_strings`: Input should be"),
        ({"generation_config": '{"eos_token_id": 999}'}, "`eos_token_id` has the token 999. The model knows 0 to 127"),
        ({"generation_config": '{"cache_implementation": "quantized"}'}, "cache_implementation` is not supported"),
        ({"generation_config": '{"\\ud800": 1}'}, r"`generation_config.\ud800` is not supported. Got 1."),
        ({"generation_config": 5000 * "["}, "must be the JSON of an object"),
        ({"generation_config": f'{{"suppress_tokens": {NESTED}}}'}, "Got [[[[...]]]]. Set it to null"),
    ],
)
def test_chats_that_are_refused(server, changes, message):
    with server.http() as client:
        answer = client.post("/v1/chat/completions", content=json.dumps(CHAT | changes), headers=JSON)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 2}, "n"),
        ({"stream_options": {}}, "stream_options"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": {"str": 1}}]}, "messages.0.content"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"generation_config": 3}, "generation_config"),
        ({"generation_config": '{"num_beams": 2}'}, "generation_config.num_beams"),
        ({"generation_config": '{"stop_strings": ["a", 3]}'}, "generation_config.stop_strings.1"),
    ],
)
def test_a_refusal_names_the_field_as_the_client_wrote_it(server, changes, field):
    with server.http() as client:
        answer = client.post("/v1/chat/completions", content=json.dumps(CHAT | changes), headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_fields_that_ask_for_nothing_are_taken(server):
    neutral = {
        "n": 1, "logprobs": None, "frequency_penalty": 0.0, "presence_penalty": 0, "tools": [], "user": "me",
        "response_format": {"type": "text"}, "stop": None, "stream": None, "seed": None, "max_completion_tokens": 2,
    }  # fmt: skip
    with server.http() as client:
        assert client.post("/v1/chat/completions", json=CHAT | neutral).status_code == 200


@pytest.mark.parametrize("body", ["", "{", "[]", "3", '{"model": "tiny"'])
def test_bodies_that_are_no_request(server, body):
    with server.http() as client:
        answer = client.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
def test_routes_that_are_not_there(server, method, path, status):
    with server.http() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert "error" in answer.json()


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
