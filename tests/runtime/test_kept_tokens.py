"""What `kept_tokens` says of a cache and of a text, against the definition of the score."""

import matplotlib
import pytest
import torch
from conversions import adapters, converted
from decoding import generate, left_padded, one_by_one, prefilled
from families import build, inputs_for, token_ids
from tiny_models import Case, tiny_model
from transformers import DynamicCache

import hf_rfa
from hf_rfa import ConfigError, UnsupportedModelError
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.runtime.calls import Interception, intercept

matplotlib.use("Agg")
KEPT, WINDOW, SINKS = 5, 8, 2
EXACT = [(0, 0), (1, 1)]


def keeping(**changes):
    return converted(kept_keys=KEPT, softmax_heads=EXACT, **changes)


def test_a_cache_names_layers_heads_and_positions():
    kept = hf_rfa.kept_tokens(prefilled(keeping(), token_ids(2, 70)))
    assert [(h.row, h.layer, h.key_head) for h in kept.heads] == [(0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 0)]
    assert (kept.tokens, kept.kept_keys, kept.window) == ((70, 70), KEPT, WINDOW)
    for head in kept.heads:
        assert len(head.positions) == len(head.scores) == KEPT
        assert list(head.positions) == sorted(set(head.positions))
        assert all(SINKS <= position < 56 for position in head.positions)  # behind the chunks of 56 to 70
        assert all(score > 0 for score in head.scores)
        assert not head.history


def test_scores_are_the_attention_that_a_query_gives():
    """In the first layer, up to the first choice, attention is exact: a key's mass is a sum of softmax weights."""
    model, ids = converted(kept_keys=KEPT), token_ids(1, 3 * WINDOW)
    seen = {}
    adapter = adapters(model)[0]

    def observe(adapter, module, query, key, value, layout, settings, output):
        seen.update(query=query, key=key, value=value, scaling=settings.scaling)

    with intercept(Interception(observers={adapter: observe})), torch.no_grad():
        model(ids[:, : 2 * WINDOW])
    cache = prefilled(model, ids[:, : 2 * WINDOW])
    query, key = seen["query"], seen["key"].repeat_interleave(2, 1)
    logits = query @ key.mT * seen["scaling"]
    causal = torch.ones(2 * WINDOW, 2 * WINDOW, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1).unflatten(1, (2, 2))[0]
    norm = seen["value"][0].norm(dim=-1)
    for head in hf_rfa.kept_tokens(cache).heads:
        if head.layer:
            continue
        wanted = {}
        for position in range(SINKS, WINDOW):  # the chunk that left
            queries = range(position + WINDOW, 2 * WINDOW)
            mass = sum(weights[head.key_head, :, i, position] for i in queries).max()  # of the two query heads
            wanted[position] = float(mass * norm[head.key_head, position] / len(queries))
        best = sorted(sorted(wanted, key=wanted.get)[-KEPT:])
        assert list(head.positions) == best
        assert list(head.scores) == pytest.approx([wanted[position] for position in best], rel=1e-4)


def test_heads_that_keep_other_numbers():
    """Their states lie in another order than the heads."""
    model, ids = keeping(head_kept_keys={(1, 0): 2}), token_ids(2, 70)
    hf_rfa.set_softmax_heads(model, [(1, 1)])
    hf_rfa.set_kept_keys(model, KEPT, {(0, 0): 9, (1, 0): 0})
    numbers = {(0, 0): 9, (0, 1): KEPT, (1, 0): 0}
    kept = hf_rfa.kept_tokens(model, ids)
    assert kept.kept_keys == 9
    assert [(h.row, h.layer, h.key_head) for h in kept.heads] == [(row, *head) for row in (0, 1) for head in numbers]
    for head in kept.heads:
        assert len(head.positions) == numbers[head.layer, head.key_head]
    # In the first layer a head keeps the same, whatever the others do.
    alike = hf_rfa.kept_tokens(converted(kept_keys=KEPT), ids)
    assert kept.heads[1].history == alike.heads[1].history
    assert kept.heads[0].history == hf_rfa.kept_tokens(converted(kept_keys=9), ids).heads[0].history
    assert len(str(kept).splitlines()) == 4 + 6


def test_a_decoder_in_progress_says_the_same_as_a_prefill():
    model, ids = keeping(), token_ids(2, 70)
    cache = prefilled(model, ids[:, :30])
    one_by_one(model, cache, ids, 30)
    got, want = hf_rfa.kept_tokens(cache), hf_rfa.kept_tokens(prefilled(model, ids))
    assert [head.positions for head in got.heads] == [head.positions for head in want.heads]
    for one, two in zip(got.heads, want.heads, strict=True):
        assert one.scores == pytest.approx(two.scores, rel=1e-4)


def test_padding_is_not_counted():
    model, (ids, mask) = keeping(), left_padded()
    out = generate(model, ids, 5, attention_mask=mask, return_dict_in_generate=True)
    kept = hf_rfa.kept_tokens(cache_of(out))
    assert kept.tokens == (51, 74, 65)
    alone = hf_rfa.kept_tokens(model, out.sequences[:1, 23:-1])
    assert [h.positions for h in kept.heads[:2]] == [h.positions for h in alone.heads]


def test_a_text_tells_what_was_kept_after_each_chunk():
    model, ids = keeping(), token_ids(2, 70)
    kept = hf_rfa.kept_tokens(model, ids)
    for chunk in range(8):
        then = hf_rfa.kept_tokens(prefilled(model, ids[:, : (chunk + 1) * WINDOW]))
        assert [head.history[chunk] for head in kept.heads] == [head.positions for head in then.heads]
    assert all(len(head.history) == 8 and head.history[-1] == head.positions for head in kept.heads)
    assert hf_rfa.kept_tokens(model, ids[1]).heads[0].history == kept.heads[2].history
    assert [head.scores for head in kept.heads] != [head.scores for head in then.heads]  # of 70 tokens, not of 64


def test_the_model_stays_as_it_was():
    model = keeping().train()
    before = torch.random.get_rng_state()
    hf_rfa.kept_tokens(model, token_ids(1, 40))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rows_and_the_table():
    kept = hf_rfa.kept_tokens(keeping(), token_ids(2, 70))
    rows = kept.rows()
    assert len(rows) == 4 * KEPT
    first = kept.heads[0]
    where = {"row": 0, "layer": 0, "key_head": 1}
    assert rows[0] == {**where, "position": first.positions[0], "score": first.scores[0]}
    lines = str(kept).splitlines()
    assert len(lines) == 4 + 4
    assert lines[0] == "at most 5 far tokens per key head, chosen after every 8; tokens seen: 70, 70"
    best_first = [position for _, position in sorted(zip(first.scores, first.positions, strict=True))][::-1]
    assert lines[4].split() == ["0", "0", "1", "5", f"{max(first.scores):.5f}", *map(str, best_first)]


def test_the_table_of_many_positions_and_of_none():
    model = converted(kept_keys=20)
    assert str(hf_rfa.kept_tokens(model, token_ids(1, 70))).endswith(" ...")
    assert str(hf_rfa.kept_tokens(model, token_ids(1, 10))).splitlines()[-1].split() == ["0", "1", "1", "0", "-"]


def test_lifetimes_count_the_chunks_for_which_a_token_was_kept():
    kept = hf_rfa.kept_tokens(keeping(), token_ids(2, 70))
    lifetimes = kept.lifetimes(row=1)
    assert lifetimes.shape == (2, 70)
    for head, counts in zip(kept.heads[2:], lifetimes.tolist(), strict=True):
        assert counts == [sum(token in past for past in head.history) for token in range(70)]
    # Whole chunks behind the window, without the sinks: 0, then 6 of 8 tokens, of which 5 are kept.
    assert lifetimes.sum(1).tolist() == [7 * KEPT, 7 * KEPT]


def test_the_plot(tmp_path):
    kept = hf_rfa.kept_tokens(keeping(), token_ids(2, 70))
    kept.plot(tmp_path / "0.png")
    kept.plot(tmp_path / "1.png", row=1)
    images = [(tmp_path / f"{row}.png").read_bytes() for row in (0, 1)]
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert images[0] != images[1]


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_without_a_place_of_their_own_in_the_cache(family):
    name = "Gemma3nForCausalLM" if family == "gemma3n_text" else "Gemma4ForCausalLM"
    model = converted(tiny_model(Case("causal_lm", family, name)), kept_keys=3)
    kept = hf_rfa.kept_tokens(model, token_ids(1, 40, vocabulary=60))
    assert sorted({head.layer for head in kept.heads}) == [1, 3, 5]  # the others have sliding windows


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "kind", "message"),
    [
        (lambda: (build("llama"), token_ids()), UnsupportedModelError, "not converted"),
        (lambda: (converted(), token_ids()), UnsupportedModelError, "kept_keys=0"),
        (lambda: (prefilled(converted(), token_ids()),), UnsupportedModelError, "keeps no far keys"),
        (lambda: (prefilled(build("llama"), token_ids()),), UnsupportedModelError, "No converted model filled"),
        (lambda: (DynamicCache(),), ConfigError, "cache is empty"),
        (lambda: (converted("bert", kept_keys=3), token_ids()), UnsupportedModelError, "causal language model"),
        (lambda: (converted("bart", kept_keys=3), token_ids()), UnsupportedModelError, "pass the cache"),
        (lambda: (keeping(),), ConfigError, "Got none"),
        (lambda: (keeping(), [[1, 2, 3]]), ConfigError, "Got list"),
        (lambda: (keeping(), torch.zeros(2, 3)), ConfigError, "float32"),
        (lambda: (keeping(), torch.zeros(1, 0, dtype=torch.int64)), ConfigError, "Got shape"),
        (lambda: (prefilled(keeping(), token_ids()), token_ids()), ConfigError, "Pass one of them"),
        (lambda: (converted(kept_keys=3, softmax_heads=[(i, j) for i in (0, 1) for j in (0, 1)]), token_ids()),
         UnsupportedModelError, "all its heads are exact"),
    ],
)  # fmt: skip
def test_what_cannot_be_told(ask, kind, message):
    with pytest.raises(kind, match=message):
        hf_rfa.kept_tokens(*ask())


def test_the_decoder_of_an_encoder_decoder_has_a_cache():
    model = converted("bart", kept_keys=3)
    with torch.no_grad():
        cache = cache_of(model(**{**inputs_for(model), "use_cache": True}))
    kept = hf_rfa.kept_tokens(cache)
    assert len({head.layer for head in kept.heads}) == 2
    assert all(len(head.positions) == 3 for head in kept.heads)


def test_a_history_that_is_not_there():
    kept = hf_rfa.kept_tokens(prefilled(keeping(), token_ids()))
    with pytest.raises(ConfigError, match="only what is kept now"):
        kept.plot("never.png")
    with pytest.raises(ConfigError, match=r"0\.\.1"):
        kept.lifetimes(2)
