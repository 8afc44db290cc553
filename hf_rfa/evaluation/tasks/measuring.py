"""Scores of a model on the tasks, each with its number of questions and a 95 % interval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.tasks.asking import greedy_answers
from hf_rfa.evaluation.tasks.filler import Filler
from hf_rfa.evaluation.tasks.generators import TASKS, Material, task_documents
from hf_rfa.evaluation.tasks.prompts import Prompts, TaskDocument
from hf_rfa.evaluation.tasks.scoring import answer_score, choice_score, wilson_interval
from hf_rfa.evaluation.tasks.wording import Wording
from hf_rfa.options import Settings, option


@dataclass(frozen=True)
class TaskSettings(Settings):
    """Which tasks, and how much of them."""

    tasks: tuple[str, ...] = option(
        f"RULER-style tasks, judged by what the model generates: {', '.join(TASKS)}. None are measured by default.", ()
    )
    task_lengths: tuple[int, ...] = option(
        "Lengths of the tasks, tokens of document, question and answer together.", (1024, 2048)
    )
    task_documents: int = option(
        "Documents of each task and length. A document has 1 (common_words), 2 (needle_multivalue, variables), 4 or "
        "16 (choice) questions.",
        5, least=1,
    )  # fmt: skip
    task_prompt: Literal["plain", "chat"] = option(
        "'plain': the model goes on with an answer that was begun; 'chat': in the tokenizer's chat template.", "plain"
    )
    task_seed: int = option("Seed of the tasks.", 0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown:
            raise ConfigError(f"`tasks` must be some of {', '.join(TASKS)}. Got {unknown}. Correct the names.")
        if self.tasks and (not self.task_lengths or min(self.task_lengths) < 1):
            raise ConfigError(
                f"`task_lengths` must be lengths of at least 1 token. Got {list(self.task_lengths)}. Set, for "
                "example, 1024,4096."
            )


@dataclass(frozen=True)
class Answered:
    """One question: where its answer stands (0 to 1; None: everywhere), what the model said, and what it is worth."""

    depth: float | None
    expected: tuple[str, ...]
    answer: str
    score: float


@dataclass(frozen=True)
class TaskScore:
    """One model on one task at one length."""

    task: str
    length: int
    samples: int  # questions
    score: float  # mean, 0 to 1
    interval: tuple[float, float]  # 95 %, Wilson
    answers: list[Answered] = field(default_factory=list)


#: Key -> its documents.
Documents = Mapping[tuple[str, int], Sequence[TaskDocument]]


def make_documents(
    settings: TaskSettings, tokenizer: PreTrainedTokenizerBase, text: str, wording: Wording | None = None
) -> dict[tuple[str, int], list[TaskDocument]]:
    """The documents of all tasks and lengths, the same for every model: (task, length) -> documents.

    Args:
        text: Filler, of any language; held-out text, if the model was trained on the rest.
        wording: The sentences of the tasks; English by default.

    Raises:
        ConfigError: too little text, a length that is too short for a task, a tokenizer without a chat template.
    """
    if not settings.tasks:
        return {}
    material = Material(Prompts(tokenizer, settings.task_prompt), Filler(tokenizer, text), wording or Wording())
    return {
        (task, length): task_documents(material, task, length, settings.task_documents, settings.task_seed)
        for task in settings.tasks
        for length in settings.task_lengths
    }


def measure_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Documents,
    after_document: Callable[[], object] = lambda: None,
) -> list[TaskScore]:  # fmt: skip
    """The model's greedy answers to all questions, scored; one `TaskScore` for each (task, length).

    Args:
        documents: From `make_documents`.
        after_document: Called after each document, for a progress bar.
    """
    scores = []
    for (task, length), each in documents.items():
        answered: list[Answered] = []
        for document in each:
            answered += scored(document, greedy_answers(model, document), tokenizer)
            after_document()
        scores.append(task_score(task, length, answered))
    return scores


def scored(
    document: TaskDocument, answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[Answered]:
    """What the answers, token ids, to a document's questions are worth."""
    found = []
    for question, ids in zip(document.questions, answers, strict=True):
        text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
        if question.task == "choice":
            score = choice_score(text, *question.answers)
        else:
            score = answer_score(text, question.answers)
        found.append(Answered(question.depth, question.answers, text, score))
    return found


def task_score(task: str, length: int, answered: Sequence[Answered]) -> TaskScore:
    mean = sum(each.score for each in answered) / len(answered)
    return TaskScore(task, length, len(answered), mean, wilson_interval(mean, len(answered)), list(answered))


def score_cell(score: TaskScore) -> str:
    """For example '85 % (71 to 93)'."""
    mean, low, high = (100 * value for value in (score.score, *score.interval))
    return f"{mean:.0f} % ({low:.0f} to {high:.0f})"


def task_rows(scores: Mapping[str, Sequence[TaskScore]]) -> list[list[str]]:
    """Rows of a table, title first, one column per model; all were asked the same questions."""
    rows = []
    for same in zip(*scores.values(), strict=True):
        first = same[0]
        rows.append([f"{first.task}, {first.length} tokens, {first.samples} questions", *map(score_cell, same)])
    return rows
