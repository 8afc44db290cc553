"""Convert a model, fine-tune it on packed documents with TRL's `SFTTrainer` (`pip install trl`), load the result.

    python examples/trl_sft.py
    python examples/trl_sft.py --model FOLDER_OR_HUB_ID --data FOLDER_OR_HUB_ID --steps 200 --output run

TRL packs several documents into a row without padding and says where each begins by `position_ids`; converted layers
keep such documents apart, so that nothing leaks from one to the next. Without options: the embedded model on the
Python standard library, a minute on a laptop.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_rfa
from hf_rfa.data import load_documents

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(Path(__file__).parent / "stdlib-llama"))
parser.add_argument("--data", default="stdlib")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--context", type=int, default=1024)
parser.add_argument("--output", default="trl-run")
given = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(given.model)
model = AutoModelForCausalLM.from_pretrained(given.model)
hf_rfa.convert(model, hf_rfa.RFAConfig(softmax_heads="auto", resample=5))


def texts(split: str, count: int) -> Dataset:
    documents = load_documents(given.data, split, max_documents=count)
    return Dataset.from_dict({"text": [document.text for document in documents]})


trainer = SFTTrainer(
    model,
    SFTConfig(
        output_dir=given.output, max_steps=given.steps, learning_rate=1e-4, per_device_train_batch_size=2,
        max_length=given.context, packing=True, packing_strategy="bfd_split", bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(), logging_steps=5, save_strategy="no", report_to="none",
    ),
    train_dataset=texts("train", 40),
    eval_dataset=texts("validation", 1),
    processing_class=tokenizer,
    callbacks=[hf_rfa.ResampleCallback()],
)  # fmt: skip
print(trainer.evaluate())
trainer.train()
print(trainer.evaluate())

trainer.save_model(Path(given.output) / "final")
model = hf_rfa.from_pretrained(Path(given.output) / "final")
print(hf_rfa.calibration_report(model))
