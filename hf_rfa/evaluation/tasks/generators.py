"""RULER-style tasks: documents in which something is hidden, and questions that only the document answers.

    needle_single    one fact of each of four forms; each is asked for
    needle_multikey  four facts of one form about different keys; each is asked for, the others distract
    needle_multivalue  two keys with two values each; all values of a key are asked for
    choice           the facts of `needle_multikey` by multiple choice; each question is asked in all rotations of its
                     four answers, so that a letter that a model prefers is right in a quarter of them
    variables        two chains `VAR A = 12345`, `VAR B = VAR A`, `VAR C = VAR B`; all variables of a value are asked
    common_words     a list of words in which three appear often and the others once or a few times

The tasks are those of RULER (Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language
Models?") in our own words and at a size that small models can do: figures are not comparable with RULER's. Where a
document holds several facts, each stands in a part of its own of the document, at a random place of it, and which
stands where is drawn anew in every document: so the places cover the whole length.
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.tasks.filler import Filler, place_of
from hf_rfa.evaluation.tasks.prompts import Prompts, Question, TaskDocument
from hf_rfa.evaluation.tasks.wording import Fact, Wording

#: Numbers of needle_multikey and choice, of needle_multivalue, and of variables.
KEYS, VALUED_KEYS, VALUES, CHAINS, CHAIN_LENGTH = 4, 2, 2, 2, 3
#: Number of common words among every ten of a list, and how much more often than any other each must appear.
COMMON_WORDS, TEN, MORE_OFTEN = 3, 10, 3
#: The common words are some of so many that are the most frequent in the text.
ORDINARY = 300
LETTERS = "ABCD"


@dataclass(frozen=True)
class Material:
    """What documents are made of."""

    prompts: Prompts
    filler: Filler
    wording: Wording = Wording()


@dataclass(frozen=True)
class _Hidden:
    """A sentence to be hidden in the text, at a depth of 0 to 1."""

    text: str
    depth: float


def _hide(
    material: Material, opening: str, hidden: Sequence[_Hidden], budget: int, generator: random.Random
) -> tuple[list[int], list[tuple[int, int]], list[float]]:
    """A document of at most `budget` tokens, the (start, end) of each hidden sentence, and its depth in the document.

    Sentences at the same place stand in the order of their depths.
    """
    prompts = material.prompts
    head, needles = prompts.opening(opening), [prompts.encode(" " + each.text) for each in hidden]
    pieces = material.filler.take(_room(budget - len(head) - sum(map(len, needles)), budget), generator)
    order = sorted(range(len(hidden)), key=lambda number: hidden[number].depth)
    places = {number: place_of(hidden[number].depth, pieces) for number in order}
    ids, spans = list(head), dict[int, tuple[int, int]]()
    for number, piece in enumerate([*pieces, []]):
        for each in order:
            if places[each] == number:
                spans[each] = (len(ids), len(ids) + len(needles[each]))
                ids += needles[each]
        ids += piece
    found = [spans[number] for number in range(len(hidden))]
    return ids, found, [start / len(ids) for start, _ in found]


def _room(tokens: int, budget: int) -> int:
    if tokens < 1:
        raise ConfigError(
            f"The task leaves no room for the text around it. Got a length that leaves {budget} tokens for the "
            "document. Set longer lengths."
        )
    return tokens


def _depths(count: int, generator: random.Random) -> list[float]:
    """A depth in each of `count` equal parts, in random order."""
    depths = [(number + generator.random()) / count for number in range(count)]
    generator.shuffle(depths)
    return depths


def _numbers(count: int, generator: random.Random) -> list[str]:
    """Different numbers of five digits."""
    return [str(number) for number in generator.sample(range(10_000, 100_000), count)]


def _asked(prompts: Prompts, task: str, question: str, start: str, answers: Sequence[str]) -> Question:
    return Question(task, prompts.question(question, start), tuple(answers), prompts.answer_tokens(answers))


def _about_facts(
    material: Material, length: int, generator: random.Random, facts: Sequence[tuple[Fact, str, str]],
    questions: Sequence[tuple[Question, Sequence[int]]],
) -> TaskDocument:  # fmt: skip
    """A document with facts (form, key, value), and questions with the numbers of the facts that answer them."""
    asking = max(len(question.ids) + question.new_tokens for question, _ in questions)
    hidden = [
        _Hidden(form.needle.format(key=key, value=value), depth)
        for (form, key, value), depth in zip(facts, _depths(len(facts), generator), strict=True)
    ]
    ids, spans, depths = _hide(material, material.wording.opening, hidden, length - asking, generator)
    placed = [
        replace(question, depth=min(depths[n] for n in numbers), spans=tuple(spans[n] for n in numbers))
        for question, numbers in questions
    ]
    return TaskDocument(length, tuple(ids), tuple(placed))


def needle_single(material: Material, length: int, generator: random.Random) -> TaskDocument:
    forms = material.wording.singles
    keys, values = generator.sample(material.wording.keys, len(forms)), _numbers(len(forms), generator)
    facts = list(zip(forms, keys, values, strict=True))
    questions: list[tuple[Question, Sequence[int]]] = []
    for number, (form, key, value) in enumerate(facts):
        question, start = form.question.format(key=key), form.answer.format(key=key)
        questions.append((_asked(material.prompts, "needle_single", question, start, [value]), [number]))
    return _about_facts(material, length, generator, facts, questions)


def needle_multikey(material: Material, length: int, generator: random.Random, choice: bool = False) -> TaskDocument:
    """`choice`: ask by multiple choice instead."""
    fact, wording = material.wording.fact, material.wording
    keys, values = generator.sample(wording.keys, KEYS), _numbers(KEYS, generator)
    facts = [(fact, key, value) for key, value in zip(keys, values, strict=True)]
    questions: list[tuple[Question, Sequence[int]]] = []
    for number, (key, value) in enumerate(zip(keys, values, strict=True)):
        if not choice:
            start = fact.answer.format(key=key)
            asked = _asked(material.prompts, "needle_multikey", fact.question.format(key=key), start, [value])
            questions.append((asked, [number]))
            continue
        for turn in range(KEYS):
            shown = values[turn:] + values[:turn]
            choices = "\n".join(f"{letter}. {each}" for letter, each in zip(LETTERS, shown, strict=True))
            question, letter = wording.choice_question.format(key=key, choices=choices), LETTERS[shown.index(value)]
            ids = material.prompts.question(question, wording.choice_answer)
            questions.append((Question("choice", ids, (letter,), 2), [number]))
    return _about_facts(material, length, generator, facts, questions)


def needle_multivalue(material: Material, length: int, generator: random.Random) -> TaskDocument:
    wording, count = material.wording, VALUED_KEYS * VALUES
    keys, values = generator.sample(wording.keys, VALUED_KEYS), _numbers(count, generator)
    facts = [(wording.fact, keys[number // VALUES], value) for number, value in enumerate(values)]
    questions = []
    for number, key in enumerate(keys):
        own = range(number * VALUES, (number + 1) * VALUES)
        question, start = wording.facts_question.format(key=key), wording.facts_answer.format(key=key)
        answers = [values[n] for n in own]
        questions.append((_asked(material.prompts, "needle_multivalue", question, start, answers), own))
    return _about_facts(material, length, generator, facts, questions)


def variables(material: Material, length: int, generator: random.Random) -> TaskDocument:
    wording, values = material.wording, _numbers(CHAINS, generator)
    names: set[str] = set()
    while len(names) < CHAINS * CHAIN_LENGTH:
        names.add("".join(generator.choices(string.ascii_uppercase, k=5)))
    chains = [sorted(names)[number::CHAINS] for number in range(CHAINS)]
    hidden: list[_Hidden] = []
    questions: list[Question] = []
    for chain, value in zip(chains, values, strict=True):
        generator.shuffle(chain)
        depths = sorted(generator.random() for _ in chain)
        hidden.append(_Hidden(wording.assignment.format(name=chain[0], value=value), depths[0]))
        hidden += [
            _Hidden(wording.alias.format(name=name, other=other), depth)
            for other, name, depth in zip(chain, chain[1:], depths[1:], strict=False)
        ]
        text = wording.variables_question.format(value=value)
        start = wording.variables_answer.format(value=value, count=len(chain))
        questions.append(_asked(material.prompts, "variables", text, start, chain))
    asking = max(len(question.ids) + question.new_tokens for question in questions)
    ids, spans, depths = _hide(material, wording.variables_opening, hidden, length - asking, generator)
    placed = []
    for number, question in enumerate(questions):
        own = slice(number * CHAIN_LENGTH, (number + 1) * CHAIN_LENGTH)
        placed.append(replace(question, depth=depths[own.start], spans=tuple(spans[own])))
    return TaskDocument(length, tuple(ids), tuple(placed))


def common_words(material: Material, length: int, generator: random.Random) -> TaskDocument:
    """Of every ten words three are the common ones; the others come round again when the text has no further ones."""
    prompts, wording = material.prompts, material.wording
    # Ordinary words, which small models have tokens for; a list needs fewer than a word for three tokens.
    vocabulary = material.filler.words()[: max(ORDINARY, length // 3)]
    common = generator.sample(vocabulary[:ORDINARY], min(COMMON_WORDS, len(vocabulary)))
    others = [word for word in vocabulary if word not in common]
    generator.shuffle(others)
    question = _asked(
        prompts, "common_words", wording.words_question.format(count=COMMON_WORDS),
        wording.words_answer.format(count=COMMON_WORDS), common,
    )  # fmt: skip
    head = prompts.opening(wording.words_opening)
    room = _room(length - len(head) - len(question.ids) - question.new_tokens, length)
    sizes = prompts.tokenizer([f" {word}," for word in vocabulary], add_special_tokens=False).input_ids
    tokens = {word: len(ids) for word, ids in zip(vocabulary, sizes, strict=True)}
    listed: list[str] = []
    for first in range(0, room, TEN - COMMON_WORDS):
        ten = common + [others[number % len(others)] for number in range(first, first + TEN - COMMON_WORDS) if others]
        room -= sum(tokens[word] for word in ten)
        if room < 0:
            break
        listed += ten
    rounds = len(listed) // TEN
    if not rounds or not others or rounds < MORE_OFTEN * -(-rounds * (TEN - COMMON_WORDS) // len(others)):
        raise ConfigError(
            f"In a list of {len(listed)} words of the text, {COMMON_WORDS} must be {MORE_OFTEN} times as common as "
            f"all others. Got {len(vocabulary)} different words of 5 to 10 letters. Pass more text, set longer "
            "lengths, or leave out the task common_words."
        )
    generator.shuffle(listed)
    ids = [*head, *prompts.encode(", ".join(listed))]
    return TaskDocument(length, tuple(ids), (replace(question, spans=((len(head), len(ids)),) * COMMON_WORDS),))


#: Name of a task -> its generator.
TASKS: dict[str, Callable[[Material, int, random.Random], TaskDocument]] = {
    "needle_single": needle_single,
    "needle_multikey": needle_multikey,
    "needle_multivalue": needle_multivalue,
    "choice": partial(needle_multikey, choice=True),
    "variables": variables,
    "common_words": common_words,
}


def task_documents(material: Material, task: str, length: int, documents: int, seed: int = 0) -> list[TaskDocument]:
    """Documents of one task, a function of (material, task, length, seed): the first ones do not depend on how many.

    Raises:
        ConfigError: an unknown task, or a length or a text that is too short for it.
    """
    if task not in TASKS:
        raise ConfigError(f"A task must be one of {', '.join(TASKS)}. Got {task!r}. Correct the name.")
    return [
        # Strings are seeds by their characters, the same in every process.
        TASKS[task](material, length, random.Random(f"{seed} {task} {length} {number}"))
        for number in range(documents)
    ]
