"""Fine-tuning on Accelerate, on one process or many."""

from hf_rfa.training.config import FinetuneConfig
from hf_rfa.training.loop import StepHook, finetune
from hf_rfa.training.step import Progress

__all__ = ["FinetuneConfig", "Progress", "StepHook", "finetune"]
