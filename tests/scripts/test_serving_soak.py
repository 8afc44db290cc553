"""The soak of the server: a few seconds of it on a tiny model, or the ten minutes of issue and documentation."""

import random

import httpx
import pytest
from servers import NAME, prompt_of, serving, tiny_model, tokenizer

import hf_rfa


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path):
    hf_rfa.save_pretrained(model, tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("minutes", [0.1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_soak_loses_no_request_and_grows_no_memory(imported, folder, minutes):
    command = imported("serving_soak")
    options = command.Options(folder=folder, minutes=minutes, clients=6, max_batch=3)
    outcome = command.soak(options)
    assert outcome.faults == []
    assert all(outcome.counts[kind] >= 2 for kind in command.KINDS)
    assert outcome.held == {"running": 0, "waiting": 0, "bytes of cache": 0}
    assert outcome.growth < options.slack_mib * command.MIB
    assert "lost 0" in outcome.report()


def test_another_answer_than_alone_and_another_status_are_lost(imported, model):
    command, requests = imported("serving_soak"), imported("benchmarks.soak_requests")
    body = {"model": NAME, "prompt": prompt_of(9), "max_tokens": 5, "temperature": 0}
    with serving(model) as server:
        good, wrong = (requests.Question("/v1/completions", body) for _ in range(2))
        with httpx.Client(base_url=server.url) as client:
            good.ask_alone(client)
        wrong.answer = f"{good.answer} "
        outcome = command.Outcome()
        told = []
        for question in (good, wrong):
            client = command.Client(server.url, [question], [requests.Malformed(b"{", 404)], outcome)
            with client.http:
                for ask in (client.ask, client.stream, client.confuse):
                    try:
                        ask(random.Random(0))
                        told.append("")
                    except AssertionError as error:
                        told.append(str(error).partition(":")[0].partition(" '")[0])
    alone, status = "Alone the answer was", "Status 404 was due. Got 400"
    assert told == ["", "", status, alone, alone, status]
