"""Every figure against a computation by hand, on a model whose answers are known."""

import itertools
import math

import pytest
import torch
from families import CACHE, llama, token_ids
from torch import nn
from trained_by_hand import Copier
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hf_rfa import evaluation
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation import measures
from hf_rfa.evaluation.speed import measure_speed, prefill

VOCABULARY = 16


class Bigram(nn.Module):
    """Predicts the next token from a table (vocabulary, vocabulary) of logits, and notes how it was called."""

    device = torch.device("cpu")

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.modes = []

    def forward(self, input_ids, use_cache=False):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return CausalLMOutput(logits=self.table[input_ids])


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (50,), generator=torch.Generator().manual_seed(1))


def test_perplexity_is_token_weighted_over_separate_windows(table, ids):
    probabilities = table.double().softmax(-1)
    losses = [-math.log(probabilities[ids[t], ids[t + 1]]) for w in range(4) for t in range(w * 12, w * 12 + 11)]
    model = Bigram(table)
    assert evaluation.perplexity(model, ids, 12) == pytest.approx(math.exp(sum(losses) / 44), rel=1e-6)
    two = evaluation.perplexity(model, ids, 12, max_windows=2)
    assert two == pytest.approx(math.exp(sum(losses[:22]) / 22), rel=1e-6)


def test_models_are_measured_in_evaluation_mode_and_come_back_as_they_were(table, ids):
    model = Bigram(table).train()
    evaluation.perplexity(model, ids, 12)
    assert set(model.modes) == {(False, False)}
    assert model.training


def test_chunks_of_positions_change_nothing(table, ids, monkeypatch):
    whole = evaluation.token_nll(Bigram(table), ids, 40)
    kl = evaluation.kl_divergence(Bigram(table), Bigram(2 * table), ids, 40)
    monkeypatch.setattr(measures, "POSITIONS_AT_ONCE", 7)
    torch.testing.assert_close(evaluation.token_nll(Bigram(table), ids, 40), whole)
    assert evaluation.kl_divergence(Bigram(table), Bigram(2 * table), ids, 40) == pytest.approx(kl, rel=1e-6)


def test_kl_divergence_is_of_the_original_from_the_converted(table, ids):
    other = 2 * table
    p, q = table.double().softmax(-1), other.double().softmax(-1)
    per_token = (p * (p / q).log()).sum(-1)
    expected = per_token[ids[:40]].mean().item()
    assert evaluation.kl_divergence(Bigram(table), Bigram(other), ids, 20) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx((q * (q / p).log()).sum(-1)[ids[:40]].mean().item(), rel=1e-2)
    assert evaluation.kl_divergence(Bigram(table), Bigram(table), ids, 20) == pytest.approx(0.0, abs=1e-7)


def test_bits_per_byte():
    # 2 bits a token of 4 bytes.
    assert evaluation.bits_per_byte(2 * math.log(2), 4.0) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="bytes_per_token"):
        evaluation.bits_per_byte(1.0, 0.0)


def test_perplexity_by_position_bins_double():
    nll = torch.arange(1, 20).float().expand(3, 19)  # the loss at position t is t
    bins = evaluation.perplexity_by_position(nll, first=4)
    assert [(b.start, b.end) for b in bins] == [(1, 4), (4, 8), (8, 16), (16, 20)]
    assert [math.log(b.perplexity) for b in bins] == pytest.approx([2.0, 5.5, 11.5, 17.5])


@pytest.mark.parametrize("gap", [0, 30])
def test_copy_perplexity_is_one_for_a_model_that_copies(gap):
    ids = torch.arange(300)
    perplexity = evaluation.copy_perplexity(Copier(reach=1000), ids, gap, span=20, samples=3, first_token=999)
    assert perplexity == pytest.approx(1.0, abs=1e-4)


def test_copy_perplexity_is_that_of_no_knowledge_where_the_span_is_out_of_reach():
    ids = torch.arange(300)
    perplexity = evaluation.copy_perplexity(Copier(reach=45), ids, gap=30, span=20, samples=3)
    assert perplexity == pytest.approx(1000.0, rel=1e-3)
    assert evaluation.copy_perplexity(Copier(reach=55), ids, gap=30, span=20, samples=3) < 1.1


def test_greedy_agreement_counts_tokens_of_the_originals_own_continuation(tiny_llama):
    ids = token_ids(1, 64, vocabulary=128)[0]
    continuations = evaluation.greedy_continuations(tiny_llama, ids, prompt=16, new=10, samples=3)
    assert continuations.shape == (3, 26)
    assert torch.equal(continuations[:, :16], torch.stack([ids[0:16], ids[21:37], ids[42:58]]))
    tiny_llama.generation_config.eos_token_id = None
    generated = tiny_llama.generate(continuations[:1, :16], max_new_tokens=10, do_sample=False)
    assert torch.equal(continuations[:1], generated)
    assert evaluation.greedy_agreement(tiny_llama, continuations, prompt=16) == 1.0
    continuations[0, 16] += 1  # the model's own choice after the prompt is not this
    continuations[0, 16] %= 128
    below = evaluation.greedy_agreement(tiny_llama, continuations, prompt=16)
    assert 20 / 30 <= below <= 29 / 30


def test_far_recovery():
    assert evaluation.far_recovery(3.0, 4.0, 3.25) == pytest.approx(0.75)
    assert evaluation.far_recovery(3.0, 4.0, 4.5) == pytest.approx(-0.5)
    assert evaluation.far_recovery(3.0, 3.0, 3.5) is None


def test_logits_that_are_no_numbers_are_named_by_position(table, ids):
    table[5] = torch.nan
    first = int((ids == 5).nonzero()[0])
    window, position = divmod(first, 10)
    with pytest.raises(FloatingPointError, match=f"position {position} of window {window} are not finite"):
        evaluation.perplexity(Bigram(table), ids, 10)


def test_a_single_forbidden_token_is_no_error(table, ids):
    table[:, 3] = -torch.inf
    assert math.isfinite(evaluation.perplexity(Bigram(table), ids[ids != 3], 10))


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda m: evaluation.perplexity(m, torch.arange(9), 10), "Got 9 tokens"),
        (lambda m: evaluation.perplexity(m, torch.arange(9)[None], 5), r"Got shape \(1, 9\)"),
        (lambda m: evaluation.perplexity(m, torch.arange(9).int(), 5), "torch.int32"),
        (lambda m: evaluation.perplexity(m, torch.arange(9), 1), "at least 2"),
        (lambda m: evaluation.perplexity(m, torch.arange(9), 5, 0), "max_windows"),
        (lambda m: evaluation.copy_perplexity(m, torch.arange(400), 300, 128, 6), "Got 400"),
        (lambda m: evaluation.copy_perplexity(m, torch.arange(400), 10, 8), "`span` > 8"),
        (lambda m: evaluation.greedy_continuations(m, torch.arange(30), 16, 4, 2), "Got 30 tokens"),
        (lambda m: measure_speed({"m": m}, torch.arange(30), 31), "Got 30"),
    ],
)
def test_too_little_text_is_said_clearly(table, measure, message):
    with pytest.raises(ConfigError, match=message):
        measure(Bigram(table))


def test_speed_counts_the_cache_after_the_prefill(tiny_llama):
    turns = []
    speeds = measure_speed({"a": tiny_llama, "b": tiny_llama}, torch.arange(100), 60, 3, 2, lambda: turns.append(1))
    assert len(turns) == 4
    # keys and values, 2 layers, 2 key heads of dim 16, float32
    assert speeds["a"].cache_bytes == 2 * 2 * 2 * 16 * 4 * 60
    assert speeds["a"].context == 60
    assert speeds["b"].prefill_seconds > 0
    assert speeds["b"].decode_tokens_per_second > 0
    assert speeds["b"].peak_bytes is None
    ticks = itertools.count()  # one a look at the clock: a second each for the prefill and for all of the decoding
    speed = measure_speed({"a": tiny_llama}, torch.arange(100), 60, 3, 2, clock=lambda: float(next(ticks)))["a"]
    assert (speed.prefill_seconds, speed.decode_tokens_per_second) == (1.0, 3.0)


def test_prefill_answers_with_the_greedy_next_token(tiny_llama):
    ids = torch.arange(20)
    with torch.no_grad():
        cache, token = prefill(tiny_llama, ids)
        assert token.item() == tiny_llama(ids[None]).logits[0, -1].argmax().item()
    assert cache.get_seq_length() == 20


def test_models_without_logits_to_keep_can_be_measured():
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None):
            return super().forward(input_ids, **{CACHE: past_key_values}, use_cache=use_cache)

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    speed = measure_speed({"m": llama(Plain, **size)}, torch.arange(32), 16, 2, 1)["m"]
    assert speed.cache_bytes == 2 * 2 * 8 * 4 * 16
