"""The text that a model writes to calibrate itself on is its own, whatever its checkpoint says of generation."""

import copy

import pytest
import torch
from families import LONGEST, SHORT, short_llama
from transformers import GenerationConfig

import hf_rfa
from hf_rfa import ConfigError
from hf_rfa.calibration.self_text import ROWS, write_text

#: Everything that would shape, shorten or break the text if `generate` took it from the model.
DEFAULTS = {
    "return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True, "output_attentions": True,
    "prompt_lookup_num_tokens": 3, "stop_strings": ["###"], "max_time": 1e-9, "cache_implementation": "static",
    "use_cache": False, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "temperature": 0.1, "top_k": 2,
    "top_p": 0.2, "min_p": 0.5, "typical_p": 0.3, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "guidance_scale": 2.0,
    "repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [8, 9]], "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [5], "forced_bos_token_id": 5, "forced_eos_token_id": 6, "max_length": 30,
    "min_length": 25, "max_new_tokens": 10, "min_new_tokens": 5, "sequence_bias": [[[7], -10.0]],
    "exponential_decay_length_penalty": (2, 1.5), "remove_invalid_values": True, "renormalize_logits": True,
    "penalty_alpha": 0.6, "dola_layers": "high", "diversity_penalty": 0.5, "num_beam_groups": 3,
    "constraints": [], "force_words_ids": [[7]], "watermarking_config": {"greenlist_ratio": 0.25},
    "assistant_early_exit": 1, "num_assistant_tokens": 4, "is_assistant": True, "token_healing": True,
    "prefill_chunk_size": 4, "compile_config": {}, "disable_compile": True, "low_memory": True,
    "encoder_repetition_penalty": 2.0, "some_entry_of_ones_own": 3,
}  # fmt: skip


def with_defaults(**settings):
    model = short_llama()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.fixture(scope="module")
def own_text():
    return write_text(short_llama(), window=8)


@pytest.mark.parametrize("name", DEFAULTS)
def test_no_default_of_the_checkpoint_has_a_say(name, own_text):
    model = with_defaults(**{name: DEFAULTS[name]})
    before, values = model.generation_config, copy.deepcopy(vars(model.generation_config))
    assert torch.equal(write_text(model, window=8), own_text)
    assert model.generation_config is before
    assert vars(before) == values


def test_nor_have_all_of_them_in_a_whole_conversion(own_text):
    model = with_defaults(**DEFAULTS)
    hf_rfa.convert(model, SHORT)
    assert hf_rfa.calibration_report(model) == hf_rfa.calibration_report(hf_rfa.convert(short_llama(), SHORT))
    assert model.generation_config.stop_strings == ["###"]


def test_the_text_is_a_plain_sample_without_an_end():
    """By hand: the model's own distribution but for the tokens that end a text, one draw after the other."""
    model = short_llama()
    text = torch.full((ROWS, 1), model.config.bos_token_id)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(20):
            logits = model(text, use_cache=False).logits[:, -1].float()
            logits[:, model.config.eos_token_id] = -torch.inf
            text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    same = (write_text(model, window=8)[:, :21] == text).all(1)
    assert same.sum() >= ROWS - 1  # a draw may lie at the edge of its token, where rounding decides


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_token_is_computed_once(use_cache):
    """Without a cache each step would run the whole text again."""
    model = with_defaults(use_cache=use_cache)
    model.config.use_cache = use_cache
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    write_text(model, window=8)
    assert sum(lengths) == LONGEST - 1


def test_the_models_defaults_are_back_after_an_error(monkeypatch):
    model = with_defaults(stop_strings=["###"])
    before = model.generation_config

    def fails(*args, **kwargs):
        assert model.generation_config.stop_strings is None
        raise ZeroDivisionError

    monkeypatch.setattr(type(model), "generate", fails)
    with pytest.raises(ZeroDivisionError):
        write_text(model, window=8)
    assert model.generation_config is before


def test_generate_of_a_checkpoints_own_code_is_not_asked(own_text):
    model = short_llama()
    model.generate = lambda *args, **kwargs: pytest.fail("its text is not the model's")
    assert torch.equal(write_text(model, window=8), own_text)


def test_a_class_that_writes_something_else_is_told(monkeypatch):
    model = short_llama()
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: [1, 2, 3])
    with pytest.raises(ConfigError, match=rf"did not write {ROWS} texts of 120 tokens. Got list. Pass texts"):
        write_text(model, window=8)


def test_several_tokens_that_end_a_text_and_none():
    several = with_defaults(eos_token_id=[1, 5, 6])
    assert not torch.isin(write_text(several, window=8)[:, 1:], torch.tensor([1, 5, 6])).any()
    none = with_defaults(eos_token_id=None)
    assert (write_text(none, window=8)[:, 1:] == 1).any()


def test_a_model_without_generation_defaults_writes_too(own_text):
    model = short_llama()
    model.generation_config = GenerationConfig(bos_token_id=model.config.bos_token_id)
    assert write_text(model, window=8).shape == own_text.shape


def test_long_texts_are_joined_of_pieces_that_are_written_side_by_side(monkeypatch):
    monkeypatch.setattr("hf_rfa.calibration.self_text.PIECE", 50)
    model, seen = with_defaults(), []

    def watch(module, args, kwargs):
        seen.append(kwargs["input_ids"].shape)

    with model.register_forward_pre_hook(watch, with_kwargs=True):
        text = write_text(model, window=16)
    assert text.shape == (ROWS, 120)  # three pieces of 40 tokens each
    assert len(seen) == 39
    assert {shape[0] for shape in seen} == {3 * ROWS}
    first = text[:, ::40]
    assert (first == first[0, 0]).all()
    assert len({tuple(piece) for piece in text.reshape(-1, 40).tolist()}) == 3 * ROWS
