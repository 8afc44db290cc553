"""RULER-style tasks: their generators, the questions asked of a model, and the scores of its answers."""

from hf_rfa.evaluation.tasks.generators import TASKS, task_documents
from hf_rfa.evaluation.tasks.measuring import TaskScore, TaskSettings, make_documents, measure_tasks

__all__ = ["TASKS", "TaskScore", "TaskSettings", "make_documents", "measure_tasks", "task_documents"]
