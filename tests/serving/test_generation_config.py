"""`generation_config`, the settings that Transformers' own clients send: they choose and end as `generate` does."""

import json

from servers import CHAT, NAME, generated, prompt_of, words
from transformers import GenerationConfig


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
