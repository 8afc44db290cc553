"""The engine without a network, step by step: who is in the batch, and what goes wrong."""

import pytest
import torch
from conversions import converted
from families import build, llama
from servers import POSITIONS, WORDS, continued, generated, prompt_of, tiny_model, tokenizer

from hf_rfa import ConfigError, UnsupportedModelError
from hf_rfa.serving.engine import Engine
from hf_rfa.serving.errors import RequestError
from hf_rfa.serving.model import ServedModel
from hf_rfa.serving.sampling import Sampling
from hf_rfa.serving.sequence import Failed, Finished, Order, Sequence, Text
from hf_rfa.serving.text import TextStream

GREEDY = Sampling(temperature=0)


class Notes:
    """An observer that keeps the figures."""

    def __init__(self):
        self.steps, self.reasons, self.failures = [], [], 0

    def token(self, sequence, seconds):
        assert seconds >= 0

    def left(self, sequence, reason, seconds):
        self.reasons.append(reason)

    def stepped(self, running, waiting, cache_bytes):
        self.steps.append((running, waiting, cache_bytes))

    def step_failed(self):
        self.failures += 1


class Asked:
    """A request, and the events that it got."""

    def __init__(self, length, count, seed=0, **options):
        self.prompt, self.count, self.events = prompt_of(length, seed), count, []
        tokens = tokenizer()(self.prompt).input_ids
        order = Order(tokens, count, **{"sampling": GREEDY, **options})
        self.sequence = Sequence(order, TextStream(tokenizer(), tokens, order.stop), self.events.append)

    @property
    def end(self):
        return self.events[-1] if self.events and not isinstance(self.events[-1], Text) else None

    @property
    def tokens(self):
        return self.sequence.tokens[len(self.sequence.order.prompt) :]


class Bench:
    """An engine that runs when it is told to."""

    def __init__(self, model, **limits):
        self.model, self.notes = model, Notes()
        self.served = ServedModel(model)
        self.engine = Engine(self.served, self.notes, **limits)

    def ask(self, *arguments, **options):
        asked = Asked(*arguments, **options)
        self.engine.submit(asked.sequence)
        return asked

    def run(self, *requests, steps=600):
        for _ in range(steps):
            if all(asked.end for asked in requests):
                return
            self.engine.step()
        raise AssertionError("they do not end")

    def check(self, *requests):
        """Each request has got all of `model.generate`'s tokens, and was told so."""
        self.run(*requests)
        for asked in requests:
            assert asked.tokens == generated(self.model, asked.prompt, asked.count)
            assert asked.end == Finished("length", len(asked.sequence.order.prompt), asked.count)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def bench(model):
    return Bench(model)


@pytest.mark.parametrize("original", [False, True], ids=["converted", "original"])
def test_requests_that_come_at_any_time_get_the_tokens_of_generate(original):
    bench = Bench(tiny_model(original=original), max_batch=6, prefill_tokens=40)
    requests = []
    for number in range(14):
        requests.append(bench.ask(3 + 37 * number % 101, 2 + 7 * number % 19, seed=number))
        bench.engine.step()
    bench.check(*requests)
    assert max(running for running, *_ in bench.notes.steps) == 6
    assert bench.notes.steps[-1] == (0, 0, 0)


def test_a_long_prompt_holds_nobody_up(model):
    bench = Bench(model, prefill_tokens=16)
    short = bench.ask(5, 40)
    bench.engine.step()
    long = bench.ask(300, 3)
    for _ in range(300 // 16):
        before = len(short.tokens)
        bench.engine.step()
        assert len(short.tokens) == before + 1
        assert not long.tokens
    bench.check(short, long)


def test_a_batch_of_one_and_a_batch_of_none(model):
    bench = Bench(model, max_batch=1)
    first, second = bench.ask(9, 4), bench.ask(4, 1)
    bench.engine.step()
    assert first.tokens
    assert not second.tokens
    bench.check(first, second)


def test_tokens_that_end_an_answer(bench):
    everything = Asked(20, 12)
    expected = generated(bench.model, everything.prompt, 12)
    last = expected[5]
    asked = bench.ask(20, 12, ends=frozenset([last]))
    bench.run(asked)
    count = expected.index(last) + 1
    assert asked.tokens == expected[:count]
    assert asked.end == Finished("stop", 20, count)
    assert f"w{last}" not in "".join(event.text for event in asked.events[:-1]).split()


def test_cancelled_requests_leave_with_their_memory(bench):
    stay, go, waits = bench.ask(11, 30), bench.ask(200, 30), None
    for _ in range(3):
        bench.engine.step()
    both = bench.notes.steps[-1][2]
    waits = bench.ask(7, 5)
    for asked in (go, waits):
        bench.engine.cancel(asked.sequence)
    bench.engine.step()
    assert [type(asked.end) for asked in (go, waits)] == [Finished, Finished]
    assert go.end.reason == waits.end.reason == "cancelled"
    assert 0 < bench.notes.steps[-1][2] < both / 2
    bench.check(stay)
    bench.engine.cancel(stay.sequence)  # it has ended
    bench.engine.step()
    assert bench.notes.reasons == ["cancelled", "cancelled", "length"]


def test_a_prompt_is_cancelled_while_it_is_read(model):
    bench = Bench(model, prefill_tokens=16)
    long, other = bench.ask(300, 3), bench.ask(5, 3)
    bench.engine.step()
    bench.engine.cancel(long.sequence)
    bench.check(other)
    assert long.end == Finished("cancelled", 300, 0)


# --- failures --------------------------------------------------------------------------------------------------------


def breaks(monkeypatch, served, name, condition):
    """Let the model's `name` raise where the condition holds for its arguments."""
    own = getattr(served, name)

    def call(cache, tokens, seen):
        if condition(tokens):
            raise RuntimeError("out of luck")
        return own(cache, tokens, seen)

    monkeypatch.setattr(served, name, call)


def test_a_prompt_that_fails_fails_alone(bench, monkeypatch):
    breaks(monkeypatch, bench.served, "prefill", lambda tokens: len(tokens) == 33)
    good, bad, more = bench.ask(12, 8), bench.ask(33, 8), bench.ask(15, 8)
    bench.check(good, more)
    assert isinstance(bad.end, Failed)
    assert bench.notes.reasons == ["failed", "length", "length"]


def test_a_step_that_fails_once_costs_nobody_a_token(bench, monkeypatch):
    requests = [bench.ask(10 + 9 * number, 20, seed=number) for number in range(5)]
    for _ in range(4):
        bench.engine.step()
    calls = []
    breaks(monkeypatch, bench.served, "decode", lambda tokens: calls.append(tokens) or len(calls) == 3)
    bench.check(*requests)
    assert bench.notes.failures == 1


def test_the_request_that_breaks_every_step_fails_alone(bench, monkeypatch):
    requests = [bench.ask(10 + 9 * number, 20, seed=number) for number in range(5)]
    expected = [generated(bench.model, asked.prompt, 20) for asked in requests]
    # A token that only one of them gets, after some others; whatever reads it as the last one fails.
    poison = next(token for token in expected[2][1:] if sum(token in answer for answer in expected) == 1)
    breaks(monkeypatch, bench.served, "decode", lambda tokens: poison in tokens)
    breaks(monkeypatch, bench.served, "prefill", lambda tokens: tokens[-1] == poison)
    others = [asked for asked in requests if asked is not requests[2]]
    bench.check(*others)
    assert isinstance(requests[2].end, Failed)
    assert requests[2].tokens == expected[2][: expected[2].index(poison) + 1]


def test_when_every_step_fails_all_are_told_and_the_engine_goes_on(bench, monkeypatch):
    requests = [bench.ask(10, 20, seed=number) for number in range(3)]
    with monkeypatch.context() as broken:
        breaks(broken, bench.served, "decode", lambda tokens: True)
        bench.run(*requests, steps=20)
    assert all(isinstance(asked.end, Failed) for asked in requests)
    bench.check(bench.ask(10, 20))


def test_logits_that_are_not_finite_fail_their_own_row(bench, monkeypatch):
    good, bad = bench.ask(40, 8), bench.ask(14, 8)
    own = bench.served.decode

    def decode(cache, tokens, seen):
        logits = own(cache, tokens, seen).clone()
        logits[torch.tensor(seen) == 16] = torch.nan
        return logits

    monkeypatch.setattr(bench.served, "decode", decode)
    bench.check(good)
    assert isinstance(bad.end.error, FloatingPointError)
    assert len(bad.tokens) == 3


def test_a_request_that_nobody_listens_to_fails_alone(bench):
    def raises(event):
        raise RuntimeError("the event loop is closed")

    good, bad = bench.ask(12, 8), Asked(13, 8)
    bad.sequence._emit = raises
    bench.engine.submit(bad.sequence)
    bench.check(good)
    assert bench.notes.reasons[0] == "failed"


def test_no_more_wait_than_may(model):
    bench = Bench(model, max_batch=2, max_waiting=3)
    requests = [bench.ask(6, 5, seed=number) for number in range(5)]
    with pytest.raises(RequestError, match="3 requests wait already") as refused:
        bench.ask(6, 5)
    assert refused.value.status == 429
    assert int(refused.value.headers["Retry-After"]) >= 1
    bench.check(*requests)
    bench.check(bench.ask(6, 5))


def test_stopping_tells_those_that_are_still_there(model):
    bench = Bench(model, max_batch=1)
    requests = [bench.ask(100, 400), bench.ask(100, 400)]
    bench.engine.start()
    assert bench.engine.alive
    bench.engine.stop()
    assert not bench.engine.alive
    assert [asked.end.error.status for asked in requests] == [503, 503]
    with pytest.raises(RequestError, match="shutting down"):
        bench.ask(6, 5)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt"])
def test_other_families(family):
    bench = Bench(converted(family), prefill_tokens=30)
    requests = [bench.ask(10 + 31 * number, 12, seed=number) for number in range(4)]
    for asked in requests:
        asked.sequence.tokens[:] = [token % 90 + 5 for token in asked.sequence.tokens]  # a smaller vocabulary
    bench.run(*requests)
    for asked in requests:
        assert continued(bench.model, asked.sequence.tokens[:-12], 12) == asked.sequence.tokens[-12:]


def test_recurrent_layers_are_refused():
    with pytest.raises(UnsupportedModelError, match="cannot share a batch"):
        ServedModel(converted("jamba"))


def test_encoder_decoders_are_refused():
    with pytest.raises(UnsupportedModelError, match="decoders whose forward takes"):
        ServedModel(build("bart"))


def test_a_model_that_answers_otherwise_in_a_batch_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(ServedModel, "stack", lambda self, caches: stack_without_order(caches))
    with pytest.raises(UnsupportedModelError, match="answers differently in a batch"):
        ServedModel(model)


def stack_without_order(caches):
    from hf_rfa.runtime.stacking import stack_caches

    return stack_caches(list(reversed(caches)))


def test_lengths():
    served = ServedModel(tiny_model())
    assert (served.max_length, served.vocabulary) == (POSITIONS, WORDS)
    assert ServedModel(tiny_model(), 100).max_length == 100
    with pytest.raises(ConfigError, match="cannot be more than the model's 512 positions"):
        ServedModel(tiny_model(), 513)


def test_a_short_context_is_tried_too():
    assert ServedModel(llama(max_position_embeddings=4)).max_length == 4
