"""Convert a model and fine-tune it with `transformers.Trainer`, then load the result.

    python examples/trainer.py
    python examples/trainer.py --model FOLDER_OR_HUB_ID --data FOLDER_OR_HUB_ID --steps 200 --output run

The converted model is a Transformers model like before: checkpoints, resuming and `trainer.save_model` work as they
do without hf_rfa. Without options: the embedded model on the Python standard library, a minute on a laptop.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import hf_rfa
from hf_rfa.data import evaluation_windows, load_documents, tokenize_documents

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(Path(__file__).parent / "stdlib-llama"))
parser.add_argument("--data", default="stdlib")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--context", type=int, default=1024)
parser.add_argument("--output", default="trainer-run")
given = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(given.model)


def rows(split: str, windows: int) -> list[dict]:
    tokens, _ = tokenize_documents(tokenizer, load_documents(given.data, split, max_documents=40))
    return [{"input_ids": ids, "labels": ids} for ids in evaluation_windows(tokens, given.context, windows)]


train, validation = rows("train", 256), rows("validation", 8)
model = AutoModelForCausalLM.from_pretrained(given.model)
config = hf_rfa.RFAConfig(softmax_heads="auto", resample=5)  # omega is redrawn every 5 steps by the callback
hf_rfa.convert(model, config, calibrate=[row["input_ids"][None] for row in train[:2]])

trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=given.output, max_steps=given.steps, learning_rate=1e-4, per_device_train_batch_size=2,
        per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=10, save_strategy="steps", save_steps=10,
        logging_steps=5, dataloader_pin_memory=torch.cuda.is_available(), report_to="none",
    ),
    train_dataset=train,
    eval_dataset=validation,
    data_collator=default_data_collator,
    callbacks=[hf_rfa.ResampleCallback()],
)  # fmt: skip
print(trainer.evaluate())
trainer.train()
print(trainer.evaluate())

trainer.save_model(Path(given.output) / "final")
tokenizer.save_pretrained(Path(given.output) / "final")
model = hf_rfa.from_pretrained(Path(given.output) / "final")
print(hf_rfa.calibration_report(model))
