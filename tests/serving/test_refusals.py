"""Requests that are refused: by a status, a sentence and the field at fault."""

import json

import pytest
from servers import CHAT, COMPLETION, POSITIONS, prompt_of

JSON = {"Content-Type": "application/json"}  # httpx cannot write halves of characters
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
