"""`Trainer` beyond tests/test_adapter.py: its switches, an encoder, an encoder-decoder that generates to be judged."""

import dataclasses

import pytest
import torch
from families import SHORT, build, inputs_for, outputs_of, token_ids
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import hf_rfa
from hf_rfa.adapter import require_adapters

# Transformers 5.23 renamed it.
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


class Texts(torch.utils.data.Dataset):
    def __init__(self, count=8):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        ids = token_ids(1, 40, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def converted(family, **changes):
    return hf_rfa.convert(build(family), SHORT, calibrate=False)


def arguments(folder, kind=TrainingArguments, **options):
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(output_dir=str(folder), **{**settings, **options})


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


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
    model = converted("llama")
    options = {"learning_rate": 0.5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    args = arguments(tmp_path, save_steps=1, load_best_model_at_end=True, max_steps=3, **options)
    run = Trainer(model=model, args=args, train_dataset=Texts(), eval_dataset=Texts(3))
    run.train()
    best = hf_rfa.from_pretrained(run.state.best_model_checkpoint)
    inputs = inputs_for(model)
    assert torch.equal(outputs_of(model.eval(), inputs), outputs_of(best, inputs))


def test_an_encoder_decoder_is_judged_by_what_it_generates(tmp_path):
    model = converted("bart")
    args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=12)
    run = Seq2SeqTrainer(model=model, args=args, train_dataset=Texts(), eval_dataset=Texts(2))
    run.train()
    predicted = torch.from_numpy(run.predict(Texts(2)).predictions)
    inputs = torch.stack([Texts()[i]["input_ids"] for i in range(2)])
    want = model.generate(inputs, max_length=12)
    assert torch.equal(predicted[:, : want.shape[1]], want)
