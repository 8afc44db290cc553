"""`Trainer` beyond runtime/test_adapter.py: its switches, an encoder, an encoder-decoder judged by its texts."""

import dataclasses

import pytest
import torch
from conversions import converted, redrawn, same_outputs
from families import PEFT_ASKS, SHORT, build, inputs_for, outputs_of, token_ids
from trainers import Texts, arguments, losses
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import hf_rfa
from hf_rfa.runtime.adapters import require_adapters

# Transformers 5.23 renamed it.
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


def train(family, folder, **options):
    run = Trainer(model=converted(family), args=arguments(folder, **options), train_dataset=Texts())
    run.train()
    return run


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss", "deepseek_v3", "bert"])
def test_every_family_trains_and_is_evaluated(family, tmp_path):
    model = converted(family)
    run = Trainer(model=model, args=arguments(tmp_path), train_dataset=Texts(), eval_dataset=Texts(3))
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    logits = run.predict(Texts(3)).predictions
    want = outputs_of(model.eval(), {"input_ids": token_ids(1, 40, seed=1)})[0]
    logits = logits if not isinstance(logits, tuple) else logits[0]
    assert abs(logits[1] - want.numpy()).max() < 1e-4


def test_gradient_checkpointing_and_accumulation_change_nothing(tmp_path):
    plain = losses(train("llama", tmp_path, per_device_train_batch_size=4))
    checkpointing = {CHECKPOINTING: True, "gradient_accumulation_steps": 2}
    other = losses(train("llama", tmp_path, **checkpointing))
    assert other == pytest.approx(plain, abs=1e-5)


def test_bfloat16_is_near_float32_and_leaves_the_adapters_alone(tmp_path):
    run = train("llama", tmp_path, bf16=True)
    assert losses(run) == pytest.approx(losses(train("llama", tmp_path)), abs=0.05)
    assert all(adapter.omega.dtype == torch.float32 for adapter in require_adapters(run.model))


def test_the_best_checkpoint_comes_back_with_its_conversion(tmp_path):
    """A learning rate that ruins the model in its second step: the first checkpoint is the best."""
    model = converted()
    options = {"learning_rate": 0.5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    args = arguments(tmp_path, save_steps=1, load_best_model_at_end=True, max_steps=3, **options)
    run = Trainer(model=model, args=args, train_dataset=Texts(), eval_dataset=Texts(3))
    run.train()
    best = hf_rfa.from_pretrained(run.state.best_model_checkpoint)
    inputs = inputs_for(model)
    assert torch.equal(outputs_of(model.eval(), inputs), outputs_of(best, inputs))


def test_a_run_resumes_with_a_model_that_an_auto_class_loaded(tmp_path):
    straight = Trainer(
        model=redrawn(), train_dataset=Texts(),
        args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
    )  # fmt: skip
    straight.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = Trainer(model=model, args=arguments(tmp_path / "resumed", max_steps=4), train_dataset=Texts())
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed) == losses(straight)
    assert same_outputs(model.eval(), straight.model.eval())
    assert same_outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4"), model)


def with_lora(folder, name="default", more=()):
    """A LoRA on a conversion that draws again after each step, made anew as a new process would."""
    peft = pytest.importorskip("peft")
    config = dataclasses.replace(SHORT, resample=1)
    model = hf_rfa.convert(LlamaForCausalLM.from_pretrained(folder), config, calibrate=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, settings, adapter_name=name)
        for other in more:
            model.add_adapter(other, settings)
    return model


@PEFT_ASKS
# Of "default" beside a named one, Transformers 5.17 resumes the named one alone.
@pytest.mark.parametrize(("name", "more"), [("default", []), ("named", []), ("named", ["second"])], ids=str)
def test_a_lora_resumes_with_its_draw_and_saves_it(name, more, tmp_path):
    """Omega, what calibration found and learned tensors: all of the conversion is as it was at the checkpoint."""
    build("llama").save_pretrained(tmp_path / "base")

    def trainer(folder, steps):
        model = with_lora(tmp_path / "base", name, more)
        args = arguments(folder, save_strategy="steps", save_steps=2, max_steps=steps)
        return Trainer(model=model, args=args, train_dataset=Texts(), callbacks=[hf_rfa.ResampleCallback()])

    whole = trainer(tmp_path / "run", 4)
    for adapter in require_adapters(whole.model):
        adapter.alpha.fill_(0.4)  # as calibration would have, and a new conversion does not know
    whole.train()
    whole.save_model(tmp_path / "final")
    resumed = trainer(tmp_path / "again", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for one, two in zip(require_adapters(whole.model), require_adapters(resumed.model), strict=True):
        assert one.draw_number == two.draw_number == 4
        assert all(torch.equal(one.state_dict()[key], value) for key, value in two.state_dict().items())
    inputs = {"input_ids": token_ids(), "use_cache": False}
    want = outputs_of(whole.model.eval(), inputs)
    assert torch.equal(outputs_of(resumed.model.eval(), inputs), want)
    inner = "" if name == "default" else name
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-4"):
        assert torch.equal(outputs_of(hf_rfa.from_pretrained(folder / inner), inputs), want)


@PEFT_ASKS
def test_the_best_checkpoint_of_a_lora_comes_back_with_its_draw(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    scores = iter([1, 3, 2])
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "metric_for_best_model": "score"}
    run = Trainer(
        model=with_lora(tmp_path / "base"),
        args=arguments(tmp_path / "run", save_steps=1, load_best_model_at_end=True, max_steps=3, **options),
        train_dataset=Texts(),
        eval_dataset=Texts(3),
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[hf_rfa.ResampleCallback()],
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert {adapter.draw_number for adapter in require_adapters(run.model)} == {2}


def test_an_encoder_decoder_is_judged_by_what_it_generates(tmp_path):
    model = converted("bart")
    args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=12)
    run = Seq2SeqTrainer(model=model, args=args, train_dataset=Texts(), eval_dataset=Texts(2))
    run.train()
    predicted = torch.from_numpy(run.predict(Texts(2)).predictions)
    inputs = torch.stack([Texts()[i]["input_ids"] for i in range(2)])
    want = model.generate(inputs, max_length=12)
    assert torch.equal(predicted[:, : want.shape[1]], want)
