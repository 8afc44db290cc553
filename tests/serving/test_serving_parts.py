"""The parts of a server that need no model: text as it comes, sampling."""

import pytest
import torch
from tokenizers_of_tests import byte_tokenizer, word_tokenizer
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_rfa.serving.sampling import Sampler, Sampling, choose
from hf_rfa.serving.text import TextStream

# --- text ------------------------------------------------------------------------------------------------------------

TEXT = "Zażółć gęślą jaźń 🙂 end"


def streamed(tokenizer, prompt, tokens, stop=()):
    """The pieces that come with each token, and the last one."""
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


def test_pieces_are_whole_characters_and_add_up_to_the_text():
    tokenizer = byte_tokenizer()
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
    pieces, _ = streamed(tokenizer, tokenizer("before", add_special_tokens=False).input_ids, tokens)
    assert "".join(pieces) == TEXT
    assert max(map(len, pieces)) == 1
    assert pieces[2:4] == ["ż"[:0], "ż"]


def test_an_unfinished_character_is_shown_at_the_end():
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    pieces, _ = streamed(tokenizer, [], tokens)
    assert pieces == ["a", "", "", "", "\ufffd"]


def test_the_space_after_the_prompt_is_kept():
    tokenizer = word_tokenizer()
    pieces, _ = streamed(tokenizer, tokenizer("w3 w4").input_ids, tokenizer("w5 w6").input_ids)
    assert pieces == [" w5", " w6", ""]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["ab"], "xa"),
        (["cd", "b"], "xaa"),
        (["aabc"], "x"),
        (["xyz"], "xaabcd"),
        (["d"], "xaabc"),
        (["cdx"], "xaabcd"),
        (["x"], ""),
    ],
)
def test_text_ends_before_the_first_stop_string(stop, text):
    tokenizer = byte_tokenizer()
    pieces, stream = streamed(tokenizer, [], tokenizer("xaabcd", add_special_tokens=False).input_ids, stop)
    assert "".join(pieces) == text
    assert stream.stopped == (text != "xaabcd")


def test_what_may_become_a_stop_string_is_held_back():
    tokenizer = byte_tokenizer()
    pieces, _ = streamed(tokenizer, [], tokenizer("a<en<end>", add_special_tokens=False).input_ids, ["<end>"])
    assert pieces == ["a", "", "", "", "<en", "", "", "", "", ""]


# --- sampling --------------------------------------------------------------------------------------------------------


def drawn(logits, count=4000, **sampling):
    """How often each token is drawn."""
    sampler = Sampler(Sampling(**{"seed": 0, **sampling}))
    tokens = choose(torch.tensor(logits).log().repeat(count, 1), [sampler] * count)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"top_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.71}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"top_p": 0.0}, [0, 0, 0, 1]),
        ({"temperature": 0.0}, [0, 0, 0, 1]),
        ({"temperature": 0.5, "top_p": 0.5}, [0, 0, 0, 1]),
        ({"top_k": 1}, [0, 0, 0, 1]),
        ({"top_k": 3}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"top_k": 3, "top_p": 0.75}, [0, 0, 3 / 7, 4 / 7]),  # of what is left by top_k
        ({"top_k": 9}, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_frequencies(sampling, expected):
    assert (drawn([0.1, 0.2, 0.3, 0.4], **sampling) - torch.tensor(expected)).abs().max() < 0.03


class Numbered(Sampler):
    """Draws the numbers that it is told to."""

    def __init__(self, number, **sampling):
        super().__init__(Sampling(**sampling))
        self.draw = lambda: number


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 2, 4, 5, 12, pytest.param(10**400, id="huge")])
@pytest.mark.parametrize("top_p", [0.0, 0.4, 0.9, 1.0])
def test_the_distribution_is_that_of_generate(temperature, top_k, top_p):
    """Its own steps, in its order; several tokens have the same logit, as they often have in bfloat16."""
    logits = torch.tensor([[1.5, -torch.inf, 0.25, 3.0, 2.0, 1.5, 2.0, -4.0, 1.5, 0.25, -9.0, 2.0]])
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
    expected = (TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores).softmax(-1)[0]
    count = 2000
    samplers = [Numbered((n + 0.5) / count, temperature=temperature, top_k=top_k, top_p=top_p) for n in range(count)]
    found = torch.bincount(torch.tensor(choose(logits.expand(count, -1), samplers)), minlength=12) / count
    # Of tokens with the same logit, which `top_p` may part, it does not say which are kept.
    for same in logits.unique():
        group = logits[0] == same
        torch.testing.assert_close(found[group].sum(), expected[group].sum(), atol=2 / count, rtol=0)
        if top_p == 1:
            torch.testing.assert_close(found[group], expected[group], atol=2 / count, rtol=0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_tiny_temperature_is_greedy(temperature, top_k):
    logits = torch.tensor([[1.0, 80.0, -torch.inf, 79.99, -80.0], [-1.0, -80.0, -0.5, -3.0, -9.0]])
    samplers = [Sampler(Sampling(temperature=temperature, top_k=top_k)) for _ in logits]
    assert choose(logits, samplers) == [1, 2]


def test_a_row_is_chosen_as_alone_whatever_the_others_ask_for():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    asked = [
        {"seed": 1}, {"seed": 1, "top_k": 3}, {"temperature": 0.0, "top_k": 3}, {"seed": 1, "top_k": 10**400},
        {"seed": 1, "top_k": 20, "top_p": 0.5, "temperature": 0.7}, {"temperature": 0.0},
    ]  # fmt: skip
    alone = [choose(row[None], [Sampler(Sampling(**each))])[0] for row, each in zip(logits, asked, strict=True)]
    assert choose(logits, [Sampler(Sampling(**each)) for each in asked]) == alone


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])

    for number in (0.0, 1 - 2**-53):
        assert choose(logits, [Numbered(number)]) == [1]


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))

    def tokens(companions):
        own, others = Sampler(Sampling(seed=7)), [Sampler(Sampling(top_p=0.5)) for _ in range(companions)]
        rows = [torch.cat([logits[:companions], step[None]]) for step in logits]
        return [choose(row, [*others, own])[-1] for row in rows]

    assert tokens(0) == tokens(3)
    assert tokens(0) != [int(step.argmax()) for step in logits]


def test_requests_without_a_seed_differ():
    logits = torch.zeros(1, 10**6)
    assert choose(logits, [Sampler(Sampling())]) != choose(logits, [Sampler(Sampling())])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_choose_nothing_and_leave_the_other_rows_alone(wrong, temperature):
    logits = torch.tensor([[0.0, wrong, 1.0], [0.0, 9e9, 1.0]])
    samplers = [Sampler(Sampling(temperature)) for _ in range(2)]
    assert choose(logits, samplers) == [None, 1]
