"""RULER-style tasks: documents are what they say, a model that looks the answer up scores 1, one that guesses 0."""

import dataclasses
import itertools
import random
import re

import pytest
import torch
from conversions import converted
from families import llama
from processes import ROOT
from tokenizers_of_tests import byte_tokenizer
from transformers import AutoTokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.tasks import TASKS, TaskSettings, make_documents, measure_tasks, task_documents
from hf_rfa.evaluation.tasks.asking import greedy_answers
from hf_rfa.evaluation.tasks.filler import Filler, sentences
from hf_rfa.evaluation.tasks.generators import Material
from hf_rfa.evaluation.tasks.measuring import Answered, score_cell, task_rows, task_score
from hf_rfa.evaluation.tasks.prompts import Prompts, Question, TaskDocument
from hf_rfa.evaluation.tasks.scoring import answer_score, choice_score, wilson_interval
from hf_rfa.evaluation.tasks.wording import Fact, Wording

LENGTH = 3000  # of bytes
_SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "en", "ir", "os", "u")]


def english(words: int = 6000) -> str:
    """Sentences of made-up words, many of them different."""
    pairs = [a + b + c for a, b, c in itertools.islice(itertools.product(_SYLLABLES, repeat=3), 7, None, 13)]
    taken = (pairs[n * 101 % len(pairs)] for n in range(words))
    return " ".join(f"The {word}." if n % 7 == 0 else word for n, word in enumerate(taken))


CHINESE = "春天来了。花开了!鸟在树上唱歌。" * 300


@pytest.fixture(scope="module")
def byte_material() -> Material:
    tokenizer = byte_tokenizer()
    return Material(Prompts(tokenizer), Filler(tokenizer, english()))


@pytest.fixture(scope="module")
def bpe_material() -> Material:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "stdlib-llama")
    return Material(Prompts(tokenizer), Filler(tokenizer, english()))


def looked_up(prompt: str) -> str:
    """The answer to the question at the end of a prompt, by reading what stands before it."""
    text, _, asked = prompt.rpartition("\n\n")
    if "most common words in the list" in asked:
        words = re.findall(r"\w+", text.rpartition("\n\n")[2])
        return ", ".join(sorted(set(words), key=words.count, reverse=True)[:3])
    if found := re.search(r"are assigned the value (\d+) in", asked):
        value, names = found[1], []
        names += re.findall(rf"VAR (\w+) = {value}\.", text)
        while more := re.findall(rf"VAR (\w+) = VAR {names[-1]}\.", text):
            names += more
        return ", ".join(names)
    choices = dict(re.findall(r"\n([A-D])\. (\d+)", asked))
    key = re.search(r"(?:number for|number of|numbers for|opens|price of) (?:the )?(\w+)(?:,| in)", asked)
    if key is None:  # a few tokens, to see what cache there is
        return ""
    own = [s for s in re.split(r"(?<=\.) ", text) if re.search(rf"\b{key[1]}\b", s) and re.search(r"\d{5}", s)]
    values = [re.search(r"\d{5}", s)[0] for s in own]
    return next(letter for letter, each in choices.items() if each == values[0]) if choices else ", ".join(values)


class Reader(torch.nn.Module):
    """Generates what a function makes of the text before, with a cache of its own: the tokens so far."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, answer) -> None:
        super().__init__()
        self.tokenizer, self.answer, self.planned, self.read = tokenizer, answer, [], []

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        if past_key_values is None:
            self.read.append(input_ids.shape[1])
            self.planned = self.tokenizer(" " + self.answer(self.tokenizer.decode(input_ids[0])) + ".").input_ids
        position = 0 if past_key_values is None else past_key_values + 1
        logits = torch.zeros(1, input_ids.shape[1], len(self.tokenizer))
        logits[0, -1, self.planned[position] if position < len(self.planned) else 0] = 1.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=position)


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_looks_the_answer_up_scores_one_and_one_that_guesses_none(byte_material, task):
    tokenizer = byte_material.prompts.tokenizer
    documents = {(task, LENGTH): task_documents(byte_material, task, LENGTH, 3)}
    (score,) = measure_tasks(Reader(tokenizer, looked_up), tokenizer, documents)
    assert score.score == 1.0, score.answers
    assert score.samples == 3 * {"choice": 16, "common_words": 1, "variables": 2, "needle_multivalue": 2}.get(task, 4)
    (guessed,) = measure_tasks(Reader(tokenizer, lambda _: "A 13579, FLXQA, and so on"), tokenizer, documents)
    assert guessed.score == (0.25 if task == "choice" else 0.0)  # every letter is right in one rotation of four


@pytest.mark.parametrize("task", TASKS)
def test_documents_are_a_function_of_the_seed(byte_material, task):
    four = task_documents(byte_material, task, LENGTH, 4, seed=1)
    assert task_documents(byte_material, task, LENGTH, 2, seed=1) == four[:2]
    assert len({document.ids for document in four}) == 4
    assert task_documents(byte_material, task, LENGTH, 1, seed=2)[0].ids != four[0].ids


@pytest.mark.parametrize("material", ["byte_material", "bpe_material"])
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_stands_where_it_is_said_to_stand(request, task, material):
    material, length = request.getfixturevalue(material), LENGTH
    decode = material.prompts.tokenizer.decode
    for document in task_documents(material, task, length, 3):
        for question in document.questions:
            fits = len(document.ids) + len(question.ids) + question.new_tokens
            assert length - 200 < fits + (max(len(q.ids) for q in document.questions) - len(question.ids)) <= length
            answers = question.answers
            if task == "choice":
                asked = decode(list(question.ids))
                answers = (re.search(rf"\n{answers[0]}\. (\d+)", asked)[1],)
            assert len(question.spans) == len(answers)
            for (start, end), answer in zip(question.spans, answers, strict=True):
                assert answer in decode(list(document.ids[start:end]))
                elsewhere = decode(list(document.ids[:start])) + "|" + decode(list(document.ids[end:]))
                assert task == "variables" or not re.search(rf"\b{answer}\b", elsewhere)
            if task == "common_words":
                assert question.depth is None
            else:
                assert question.depth == min(start for start, _ in question.spans) / len(document.ids)
    depths = [q.depth for document in task_documents(material, task, length, 10) for q in document.questions]
    if task != "common_words":
        assert min(depths) < 0.2
        assert max(depths) > (0.5 if task in ("variables", "needle_multivalue") else 0.8)


def test_a_chain_of_variables_stands_in_its_order(byte_material):
    for document in task_documents(byte_material, "variables", LENGTH, 5):
        for question in document.questions:
            assert sorted(question.spans) == list(question.spans)


def test_filler_of_another_language_and_sentences_of_one_s_own():
    tokenizer = byte_tokenizer()
    wording = Wording(
        opening="请记住文中的数字。\n\n",
        fact=Fact("{key}的密码是{value}。", "{key}的密码是什么?", "{key}的密码是"),
        keys=("机场", "桥", "相机", "城堡", "花园"),
    )
    material = Material(Prompts(tokenizer), Filler(tokenizer, CHINESE), wording)
    document = task_documents(material, "needle_multikey", 2000, 1)[0]
    for question in document.questions:
        start, end = question.spans[0]
        hidden = tokenizer.decode(list(document.ids[start:end]))
        assert re.fullmatch(r" (机场|桥|相机|城堡|花园)的密码是" + question.answers[0] + "。", hidden)
        assert tokenizer.decode(list(document.ids[:start]))[-1] in "。!\n"  # between two sentences
        assert answer_score(f"密码是{question.answers[0]}。", question.answers) == 1.0


def test_sentences_joined_are_the_text():
    code = "def f(x):\n    return x\n" * 40
    for text in (english(200), CHINESE, 'He said "No." And left!\n\nNext… one', code):
        assert "".join(sentences(text)) == text
    assert len(sentences(CHINESE)) == 600
    assert len(sentences(code)) >= 80  # lines, where no sentence ends


def test_filler_takes_consecutive_sentences_that_fit():
    tokenizer = byte_tokenizer()
    filler = Filler(tokenizer, english(500))
    for seed in range(20):
        taken = filler.take(300, random.Random(seed))
        assert 300 - 70 < sum(map(len, taken)) <= 300
        assert tokenizer.decode([*itertools.chain(*taken)]) in english(500)
    with pytest.raises(ConfigError, match="A document needs 10000000 tokens of filler text"):
        filler.take(10_000_000, random.Random(0))


@pytest.mark.parametrize("variant", ["softmax", "converted", "exact head"])
def test_answers_on_copies_of_a_cache_are_those_of_reading_document_and_question_at_once(variant):
    model = llama(gain=8, vocab_size=99, max_position_embeddings=512)
    if variant != "softmax":
        heads = [(1, 0)] if variant == "exact head" else None
        model = converted(model, window=16, kept_keys=8, softmax_heads=heads)
    model.generation_config.eos_token_id = None
    ids = torch.randint(5, 99, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    questions = tuple(Question("t", tuple(ids[n : n + 7]), ("x",), 6) for n in (0, 20, 40))
    answers = greedy_answers(model, TaskDocument(200, tuple(ids), questions))
    for question, answer in zip(questions, answers, strict=True):
        so_far = [*ids, *question.ids]
        for token in answer:
            with torch.no_grad():
                assert model(torch.tensor([so_far])).logits[0, -1].argmax() == token
            so_far.append(token)
        assert len(answer) == 6
    model.generation_config.eos_token_id = answers[0][2]
    first = greedy_answers(model, TaskDocument(200, tuple(ids), questions))[0]
    assert first == answers[0][: answers[0].index(answers[0][2])]


def test_a_model_with_a_cache_of_its_own_reads_document_and_question_at_once(byte_material):
    reader = Reader(byte_material.prompts.tokenizer, looked_up)
    document = task_documents(byte_material, "needle_multikey", LENGTH, 1)[0]
    greedy_answers(reader, document)
    whole = [len(document.ids) + len(question.ids) for question in document.questions]
    assert reader.read == [2, *whole]


def test_logits_that_are_no_numbers_are_said(byte_material):
    reader = Reader(byte_material.prompts.tokenizer, looked_up)
    forward = reader.forward

    def broken(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * torch.nan
        return output

    reader.forward = broken
    with pytest.raises(FloatingPointError, match="not finite"):
        greedy_answers(reader, task_documents(byte_material, "needle_single", LENGTH, 1)[0])


def test_a_chat_template_frames_document_question_and_answer(byte_material):
    tokenizer = byte_tokenizer(bos_token="<s>")
    tokenizer.chat_template = "{{ '<s>user: ' + messages[0]['content'] + '\n' }}assistant:"
    material = dataclasses.replace(byte_material, prompts=Prompts(tokenizer, "chat"))
    document = task_documents(material, "needle_single", LENGTH, 1)[0]
    assert tokenizer.decode(document.ids).startswith("<s>user: Some special numbers")
    assert document.ids[0] == tokenizer.bos_token_id
    asked = tokenizer.decode(document.questions[0].ids)
    assert re.fullmatch(r"\n\nWhat is .* in the text above\?\nassistant:The .* (is|was)", asked)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match=r"once and as it is\. Got it 2 times"):
        Prompts(tokenizer, "chat")
    with pytest.raises(ConfigError, match="no chat template"):
        Prompts(byte_tokenizer(), "chat")


def test_answers_are_found_as_whole_words_and_numbers():
    assert answer_score("It is 12345.", ["12345"]) == 1.0
    assert answer_score("It is 123456 or 912345", ["12345"]) == 0.0
    assert answer_score("ABC, then DEF", ["abc", "DEF", "GHI"]) == pytest.approx(2 / 3)
    assert choice_score(" B.", "B") == 1.0
    assert choice_score("BC or C", "C") == 1.0
    assert choice_score("A, not B", "B") == 0.0
    assert choice_score("none", "A") == 0.0


@pytest.mark.parametrize(
    ("mean", "samples", "low", "high"),
    # Of tables: Wilson intervals without continuity correction.
    [(0.5, 10, 0.23659, 0.76341), (0.0, 10, 0.0, 0.27753), (1.0, 20, 0.83887, 1.0), (0.9, 100, 0.82563, 0.94477)],
)
def test_wilson_intervals(mean, samples, low, high):
    assert wilson_interval(mean, samples) == pytest.approx((low, high), abs=1e-5)


def test_scores_are_means_with_their_number_of_questions():
    answered = [Answered(0.5, ("1",), "1", 1.0), Answered(0.5, ("1",), "2", 0.0)] * 5
    score = task_score("needle_single", 1024, answered)
    assert (score.score, score.samples) == (0.5, 10)
    assert score_cell(score) == "50 % (24 to 76)"
    assert task_rows({"a": [score], "b": [score]}) == [
        ["needle_single, 1024 tokens, 10 questions", "50 % (24 to 76)", "50 % (24 to 76)"]
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: TaskSettings(tasks=("needles",)), r"`tasks` must be some of needle_single, .* Got \['needles'\]"),
        (lambda m: TaskSettings(tasks=("choice",), task_lengths=()), "`task_lengths` must be"),
        (lambda m: task_documents(m, "needles", 1000, 1), "A task must be one of"),
        (lambda m: task_documents(m, "needle_single", 300, 1), "leaves no room for the text around it"),
        (lambda m: task_documents(m, "needle_single", 10**6, 1), "tokens of filler text"),
        (lambda m: task_documents(m, "common_words", 250, 1), "leave out the task common_words"),
        (lambda m: wilson_interval(0.5, 0), "at least 1 sample"),
    ],
)
def test_mistakes_are_said_clearly(byte_material, call, message):
    with pytest.raises(ConfigError, match=message):
        call(byte_material)


def test_no_tasks_make_no_documents():
    assert make_documents(TaskSettings(), byte_tokenizer(), "") == {}
