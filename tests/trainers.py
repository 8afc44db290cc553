"""What the tests of Transformers' `Trainer` share: texts, settings, the losses of a run."""

import torch
from families import token_ids
from transformers import Trainer, TrainingArguments


class Texts(torch.utils.data.Dataset):
    """Texts of 40 tokens, the same every time."""

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = token_ids(1, 40, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def arguments(folder, kind=TrainingArguments, **options):
    """Two quiet steps on the CPU, nothing saved, but for `options`."""
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(output_dir=str(folder), **{**settings, **options})


def losses(run: Trainer) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
