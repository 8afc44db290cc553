"""PEFT around a converted model beyond LoRA on a Llama: other families, other methods, prefixes, merging."""

import dataclasses

import pytest
import torch
from conversions import converted, redrawn, same_outputs
from families import CACHE, PEFT_ASKS, SHORT, build, lora, outputs_of, token_ids, wrap
from packaging.version import Version
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertModel
from transformers.integrations.peft import MIN_PEFT_VERSION

import hf_rfa
from hf_rfa import CheckpointError, UnsupportedModelError
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.arguments import cache_of

peft = pytest.importorskip("peft")

METHODS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], init_weights=False),
}
#: PEFT hands its prefix over under the name that the cache had until Transformers 5.23.
PEFT_SAYS_PAST = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_hidden_size=16
    ),
}  # fmt: skip

PAIR = {"rfa_config.json", "rfa_model.safetensors"}

# What PEFT says of every model.
IGNORED_POSITIONS = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")


def gradients_of(model):
    model.train()(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@PEFT_ASKS
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss", "deepseek_v3", "bert"])
def test_a_lora_trains_merges_and_is_taken_off(family):
    model, inputs = converted(family), {"input_ids": token_ids()}
    plain = outputs_of(model, inputs)
    wrapped = lora(model, family, task=None)
    tuned = outputs_of(wrapped, inputs)
    assert (tuned - plain).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(outputs_of(wrapped, inputs), plain)
    assert all("lora" in name for name in gradients_of(wrapped))
    merged = wrapped.eval().merge_and_unload()
    assert_close(outputs_of(merged, inputs), tuned, atol=1e-4, rtol=0)
    assert require_adapters(merged)


@PEFT_ASKS
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_train_and_merge(method):
    wrapped, inputs = wrap(converted(), METHODS[method]()), {"input_ids": token_ids(), "use_cache": False}
    tuned = outputs_of(wrapped, inputs)
    assert any(grad.abs().max() > 0 for grad in gradients_of(wrapped).values())
    assert_close(outputs_of(wrapped.eval().merge_and_unload(), inputs), tuned, atol=1e-4, rtol=0)


@PEFT_ASKS
def test_all_linear_layers_are_the_models_own():
    """PEFT looks for linear layers by itself: an adapter has none."""
    with_rfa = wrap(converted(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    without = wrap(build("llama"), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    names = [{name for name, _ in model.named_parameters()} for model in (with_rfa, without)]
    assert names[0] == names[1]


@PEFT_ASKS
@IGNORED_POSITIONS
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_learned_prompts_are_tokens_like_others(family, prompt):
    ids = token_ids()

    def generated(wrapped, use_cache):
        return wrapped.generate(input_ids=ids, use_cache=use_cache, do_sample=False, max_new_tokens=8)

    softmax, wrapped = (wrap(model, PROMPTS[prompt]()) for model in (build(family), converted(family)))
    if torch.equal(generated(softmax, True), generated(softmax, False)):
        assert torch.equal(generated(wrapped, True), generated(wrapped, False))
    else:  # PEFT 0.21 looks for `past_key_values`, which is `cache` since Transformers 5.24
        assert CACHE == "cache"
    assert any(grad.abs().max() > 0 for grad in gradients_of(wrapped).values())


def with_prefix(model, tokens=6):
    wrapped = wrap(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    with torch.no_grad():
        for parameter in wrapped.prompt_encoder.parameters():
            parameter.mul_(2)
    return wrapped


@PEFT_SAYS_PAST
@PEFT_ASKS
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("converted_first", [True, False])
def test_a_prefix_in_the_window_is_the_prefix_of_softmax(family, converted_first):
    inputs = {"input_ids": token_ids()}
    want = outputs_of(with_prefix(build(family)), inputs)
    config = dataclasses.replace(SHORT, window=80)
    if converted_first:
        model = with_prefix(converted(family, config))
    else:
        model = hf_rfa.convert(with_prefix(build(family)), config, calibrate=False)
    assert_close(outputs_of(model, inputs), want, atol=2e-5, rtol=0)
    assert (want - outputs_of(build(family), inputs)).abs().max() > 1e-2


@PEFT_SAYS_PAST
@PEFT_ASKS
@IGNORED_POSITIONS
@pytest.mark.parametrize("softmax_heads", [None, [(1, 0)]])
def test_a_prefix_out_of_the_window_is_estimated_trained_and_generated_from(softmax_heads):
    """Six virtual tokens: two are sinks, the others are far from the last of 70 tokens."""
    wrapped, ids = with_prefix(converted("llama", softmax_heads=softmax_heads)), token_ids()
    before = outputs_of(wrapped, {"input_ids": ids})
    if CACHE == "past_key_values":  # PEFT 0.21 hands a prefix to `generate` under that name only
        tokens = wrapped.generate(input_ids=ids, do_sample=False, max_new_tokens=12)
        logits = outputs_of(wrapped, {"input_ids": tokens})
        assert torch.equal(logits[:, 69:-1].argmax(-1), tokens[:, 70:])
    wrapped(input_ids=ids).logits[:, -1].square().sum().backward()
    weight = wrapped.prompt_encoder["default"].embedding.weight
    assert (weight.grad.abs().amax(1) > 0).all()
    with torch.no_grad():
        weight[3:].mul_(-1)
    assert (outputs_of(wrapped, {"input_ids": ids})[:, -1] - before[:, -1]).abs().max() > 1e-5


@PEFT_SAYS_PAST
@PEFT_ASKS
def test_a_prefix_before_padded_rows():
    wrapped, ids = with_prefix(converted()), token_ids()
    mask = (torch.arange(70) >= torch.tensor([[23], [0]])).long()
    position = 6 + (mask.cumsum(1) - 1).clamp_min(0)
    padded = outputs_of(wrapped.get_base_model(), {
        "input_ids": ids, "position_ids": position, CACHE: wrapped.get_prompt(2),
        "attention_mask": torch.cat([mask.new_ones(2, 6), mask], dim=1),
    })  # fmt: skip
    bare = outputs_of(wrapped, {"input_ids": ids[:1, 23:]})
    assert_close(padded[0, 23:], bare[0], atol=2e-5, rtol=0)


@PEFT_SAYS_PAST
@PEFT_ASKS
def test_a_prefix_of_a_bidirectional_layer_is_refused():
    wrapped = wrap(converted("bert"), peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=6))
    with pytest.raises(UnsupportedModelError, match="prefix tuning"):
        wrapped(input_ids=token_ids())


@PEFT_SAYS_PAST
@PEFT_ASKS
def test_a_prefix_before_kept_keys_is_refused_for_it_has_no_queries():
    with pytest.raises(UnsupportedModelError, match="not their queries"):
        with_prefix(converted(kept_keys=3))(input_ids=token_ids())


@PEFT_ASKS
def test_learned_tokens_compete_for_kept_keys_with_those_of_the_text():
    model, ids = converted(kept_keys=3), token_ids()
    wrapped = wrap(model, PROMPTS["prompt tuning"]())
    with torch.no_grad():
        together = wrapped(input_ids=ids, use_cache=False).logits
        learned = wrapped.get_prompt(batch_size=2)
        out = model(inputs_embeds=torch.cat([learned, model.get_input_embeddings()(ids[:, :40])], dim=1))
        assert_close(out.logits, together[:, :46], atol=2e-5, rtol=0)
        rest = model(ids[:, 40:], **{CACHE: cache_of(out)}).logits
    assert_close(rest, together[:, 46:], atol=2e-5, rtol=0)
    kept = {position for head in hf_rfa.kept_tokens(cache_of(out)).heads for position in head.positions}
    assert any(position < 6 for position in kept)
    assert any(position >= 6 for position in kept)


# --- saved with the conversion ---------------------------------------------------------------------------------------


def files(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


@PEFT_ASKS
@pytest.mark.parametrize("converted_first", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_pefts_own_saving_holds_the_conversion(method, converted_first, base, tmp_path):
    config = METHODS[method]()
    model = wrap(redrawn(base()), config) if converted_first else redrawn(wrap(base(), config))
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") >= PAIR
    assert same_outputs(hf_rfa.from_pretrained(tmp_path / "saved"), model)
    fresh = hf_rfa.convert(base(), SHORT, calibrate=False)
    assert not same_outputs(wrap(fresh, METHODS[method]()), model)
    again = peft.PeftModel.from_pretrained(hf_rfa.convert(base(), SHORT, calibrate=False), tmp_path / "saved")
    assert same_outputs(again, model)


@PEFT_ASKS
def test_peft_around_other_models_is_what_it_was(base, tmp_path):
    redrawn(base())  # so that PEFT has been taught
    methods = [getattr(peft.PeftModel, name) for name in ("save_pretrained", "load_adapter")]
    redrawn(base())
    assert methods == [getattr(peft.PeftModel, name) for name in ("save_pretrained", "load_adapter")]
    model = wrap(base(), METHODS["lora"]())
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert same_outputs(peft.PeftModel.from_pretrained(base(), tmp_path / "saved"), model)


@PEFT_ASKS
def test_other_processes_write_nothing(base, tmp_path):
    model = wrap(redrawn(base()), METHODS["lora"]())
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists() or not files(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    before = {name: (tmp_path / "saved" / name).stat().st_mtime_ns for name in PAIR}
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert before == {name: (tmp_path / "saved" / name).stat().st_mtime_ns for name in PAIR}


@PEFT_ASKS
def test_each_of_several_adapters_has_the_conversion_beside_it(base, tmp_path):
    model = wrap(redrawn(base()), METHODS["lora"]())
    model.add_adapter("second", METHODS["dora"]())
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") >= PAIR
    assert files(tmp_path / "saved" / "second") >= PAIR
    assert same_outputs(hf_rfa.from_pretrained(tmp_path / "saved"), model)
    model.set_adapter("second")
    assert same_outputs(hf_rfa.from_pretrained(tmp_path / "saved" / "second"), model)
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not files(tmp_path / "one") & PAIR
    with pytest.raises(CheckpointError, match=r"sub-folders \['second'\]"):
        hf_rfa.from_pretrained(tmp_path / "one")


@PEFT_ASKS
def test_a_second_adapter_has_to_fit_the_first_ones_conversion(base, tmp_path):
    model = wrap(redrawn(base()), METHODS["lora"]())
    model.save_pretrained(tmp_path / "first")
    hf_rfa.resample(model, draw=4)
    model.save_pretrained(tmp_path / "other draw")
    hf_rfa.convert(hf_rfa.revert(model), dataclasses.replace(SHORT, seed=1), calibrate=False)
    model.save_pretrained(tmp_path / "other seed")
    loaded = hf_rfa.from_pretrained(tmp_path / "first")
    loaded.load_adapter(tmp_path / "first", "twin")
    want = outputs_of(loaded, {"input_ids": token_ids()})
    with pytest.raises(CheckpointError, match=r"another draw.* Load it alone"):
        loaded.load_adapter(tmp_path / "other draw", "second")
    with pytest.raises(CheckpointError, match="seed 1; the model has seed 0"):
        loaded.load_adapter(tmp_path / "other seed", "second")
    assert set(loaded.peft_config) == {"default", "twin"}
    assert torch.equal(outputs_of(loaded, {"input_ids": token_ids()}), want)


@PEFT_ASKS
def test_a_lora_of_a_conversion_on_a_softmax_model_is_refused(base, tmp_path):
    wrap(redrawn(base()), METHODS["lora"]()).save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="attends by softmax"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "saved")
    plain = wrap(base(), METHODS["lora"]())
    with pytest.raises(CheckpointError, match="attends by softmax"):
        plain.load_adapter(tmp_path / "saved", "default")  # as a resumed Trainer does


@PEFT_ASKS
def test_within_a_distributed_wrapper_the_lora_is_saved(base, tmp_path):
    """What `accelerator.prepare` and DDP wrap around is looked through."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = wrap(redrawn(base()), METHODS["lora"]())
    hf_rfa.save_pretrained(Wrapper(Wrapper(model)), tmp_path / "saved")
    assert "model.safetensors" not in files(tmp_path / "saved")
    assert same_outputs(hf_rfa.from_pretrained(tmp_path / "saved"), model)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason="Transformers wants a newer PEFT",
)
def test_an_adapter_that_transformers_attached_itself(base, tmp_path):
    model = redrawn(base())
    model.add_adapter(METHODS["lora"]())
    for name, parameter in model.named_parameters():
        parameter.data.mul_(2 if "lora" in name else 1)
    for number, save in enumerate((hf_rfa.save_pretrained, type(model).save_pretrained)):
        folder = tmp_path / str(number)
        save(model, folder) if save is hf_rfa.save_pretrained else model.save_pretrained(folder)
        assert "model.safetensors" not in files(folder)
        assert same_outputs(hf_rfa.from_pretrained(folder), model)


# --- models that are not their base model any more -------------------------------------------------------------------


def resized(base):
    model = base()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.resize_token_embeddings(104)
    return model


def labelled(base):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_pretrained(
            base().config._name_or_path, num_labels=5, pad_token_id=2
        ).eval()


def saved_as(kind, model, folder, **options):
    model = redrawn(model)
    if kind == "alone":
        hf_rfa.save_pretrained(model, folder, adapter_only=True)
    else:
        task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type=task)
        model = wrap(model, config)
        hf_rfa.save_pretrained(model, folder) if kind == "ours" else model.save_pretrained(folder, **options)
    return model


CHANGED = pytest.mark.parametrize("change", [resized, labelled])
RESIZED = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # PEFT says so


@PEFT_ASKS
@RESIZED
@CHANGED
@pytest.mark.parametrize("kind", ["ours", "pefts own", "alone"])
def test_new_tokens_and_labels_come_back_without_further_arguments(kind, change, base, tmp_path):
    model = saved_as(kind, change(base), tmp_path / "saved")
    torch.manual_seed(7)  # what is initialised at random is not what it was
    loaded = hf_rfa.from_pretrained(tmp_path / "saved")
    assert same_outputs(loaded, model)
    assert (loaded.config.vocab_size, loaded.config.num_labels) == (model.config.vocab_size, model.config.num_labels)
    if kind != "alone":
        with loaded.disable_adapter(), model.disable_adapter():
            assert same_outputs(loaded, model) or change is labelled  # the head under PEFT's copy of it was never used


@PEFT_ASKS
@pytest.mark.filterwarnings("ignore:The `save_embedding_layers` :UserWarning")
def test_new_tokens_that_peft_does_not_save_are_kept_by_the_conversion(base, tmp_path):
    """`save_embedding_layers=False`, or a hub that PEFT cannot reach to compare sizes."""
    model = saved_as("pefts own", resized(base), tmp_path / "saved", save_embedding_layers=False)
    assert same_outputs(hf_rfa.from_pretrained(tmp_path / "saved"), model)
    again = peft.PeftModel.from_pretrained(redrawn(resized(base), draw=0), tmp_path / "saved")
    assert same_outputs(again, model)


@PEFT_ASKS
@RESIZED
@CHANGED
def test_further_arguments_still_do(change, base, tmp_path):
    model = saved_as("ours", change(base), tmp_path / "saved")
    given = {"vocab_size": 104} if change is resized else {"num_labels": 5}
    loaded = hf_rfa.from_pretrained(tmp_path / "saved", ignore_mismatched_sizes=True, dtype=torch.float32, **given)
    assert same_outputs(loaded, model)


def test_a_head_that_the_base_model_never_had_comes_back(tmp_path):
    """A pooler that is drawn at random when a `BertModel` is made of a masked language model."""
    build("bert").save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = redrawn(BertModel.from_pretrained(tmp_path / "base").eval())
    hf_rfa.save_pretrained(model, tmp_path / "saved", adapter_only=True)
    torch.manual_seed(2)
    loaded = hf_rfa.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).pooler_output, model(token_ids()).pooler_output)


def test_settings_of_the_config_come_back_without_weights(base, tmp_path):
    model = base()
    model.config.rms_norm_eps, model.config.pad_token_id = 1e-3, 7
    model = redrawn(type(model).from_pretrained(model.config._name_or_path, config=model.config).eval())
    hf_rfa.save_pretrained(model, tmp_path / "saved", adapter_only=True)
    assert files(tmp_path / "saved") == PAIR
    loaded = hf_rfa.from_pretrained(tmp_path / "saved")
    assert loaded.config.pad_token_id == 7
    assert same_outputs(loaded, model)
    assert not same_outputs(redrawn(base()), model)
