"""`hf-rfa chat`: each turn goes on where the last one stopped, with the answers of a model that reads it all anew."""

import io

import pytest
import torch
from conversions import converted
from families import llama
from tokenizers_of_tests import word_tokenizer
from typer.testing import CliRunner

import hf_rfa
from hf_rfa import ConfigError, cli
from hf_rfa.commands.chat import Conversation, _lines

PLAIN = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
#: Writes how many messages there are at the start, and so everything anew.
COUNTING = "w{{ messages | length }} " + PLAIN
#: As most do: the end of an answer stands in the template.
ENDING = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} w1{% endif %} {% endfor %}"
TURNS = ["w3 w4 w5 w6 w7 w8", "w9 w10", "w11 w12 w13"]


def parts(template=PLAIN):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return converted(llama(vocab_size=128)), tokenizer


def read_anew(model, tokenizer, messages, new):
    """The greedy answer without any cache from before."""
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    told = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
    )
    return tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True), ids


@pytest.mark.parametrize("system", [None, "w20 w21"])
@pytest.mark.parametrize("template", [PLAIN, COUNTING, ENDING])
def test_each_answer_is_that_of_a_model_that_reads_everything_anew(template, system):
    model, tokenizer = parts(template)
    conversation = Conversation(model, tokenizer, system=system, max_new_tokens=12, do_sample=False)
    caches = []
    for turn in TURNS:
        want, ids = read_anew(model, tokenizer, [*conversation.messages, {"role": "user", "content": turn}], 12)
        assert conversation.answer(turn) == want
        assert conversation.tokens == ids.shape[1] + 12
        assert torch.equal(conversation._ids[:, : ids.shape[1]], ids)
        caches.append(conversation._cache)
    assert (caches[0] is caches[1] is caches[2]) == (template != COUNTING)


def test_an_answer_that_ends_goes_on_as_the_template_says():
    model, tokenizer = parts(ENDING)
    asked = [{"role": "user", "content": TURNS[0]}]
    want, _ = read_anew(model, tokenizer, asked, 12)
    end = want.split()[4]
    model.generation_config.eos_token_id = int(end[1:])
    tokenizer.chat_template = ENDING.replace("w1{%", f"{end}{{%")
    conversation = Conversation(model, tokenizer, max_new_tokens=12, do_sample=False)
    first = conversation.answer(TURNS[0])
    assert first.split()[-1] == end  # no special token here, so it is shown
    conversation.messages[-1]["content"] = " ".join(first.split()[:-1])
    conversation._read = (conversation._read[0], conversation.messages[-1]["content"])
    want, ids = read_anew(model, tokenizer, [*conversation.messages, {"role": "user", "content": TURNS[1]}], 12)
    cache = conversation._cache
    assert conversation.answer(TURNS[1]) == want
    assert conversation._cache is cache
    assert torch.equal(conversation._ids[:, : ids.shape[1]], ids)


def test_the_memory_stays_as_it_is():
    model, tokenizer = parts()
    conversation = Conversation(model, tokenizer, max_new_tokens=30, do_sample=False)
    assert (conversation.tokens, conversation.cache_bytes) == (0, 0)
    sizes = []
    for turn in TURNS * 2:
        conversation.answer(turn)
        sizes.append(conversation.cache_bytes)
    assert len(set(sizes)) == 1
    assert conversation.tokens > 200
    conversation.reset()
    assert (conversation.tokens, conversation.cache_bytes, conversation.messages) == (0, 0, [])


def test_an_interrupted_answer_leaves_the_conversation_as_it_was():
    model, tokenizer = parts()
    conversation = Conversation(model, tokenizer, max_new_tokens=8, do_sample=False)
    conversation.answer(TURNS[0])
    before = list(conversation.messages)

    class Interrupting:
        def put(self, value):
            raise KeyboardInterrupt

        def end(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        conversation.answer(TURNS[1], Interrupting())
    assert conversation.messages == before
    want, _ = read_anew(model, tokenizer, [*before, {"role": "user", "content": TURNS[2]}], 8)
    assert conversation.answer(TURNS[2]) == want


def test_without_a_chat_template_there_is_no_conversation():
    with pytest.raises(ConfigError, match="no chat template"):
        Conversation(parts()[0], word_tokenizer())


def test_the_command_reads_its_lines_to_the_end(tmp_path):
    model, tokenizer = parts()
    hf_rfa.save_pretrained(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first, _ = read_anew(model, tokenizer, [{"role": "user", "content": TURNS[0]}], 9)
    again, _ = read_anew(model, tokenizer, [{"role": "user", "content": TURNS[1]}], 9)
    lines = [TURNS[0], "", "/help", "/reset", f"  {TURNS[1]} ", "/exit", TURNS[2]]
    arguments = ["chat", str(tmp_path), "--max-new-tokens", "9", "--greedy", "true"]
    result = CliRunner().invoke(cli.app, arguments, input="\n".join(lines), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    shown = result.output
    assert f"> {TURNS[0]}\n{first}\n[15 tokens, cache" in shown
    assert "There is no command '/help': /reset forgets the conversation, /exit leaves" in shown
    assert f"> {TURNS[1]}\n{again}\n[11 tokens, cache" in shown
    assert TURNS[2] not in shown


def test_standard_input_of_another_encoding_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(ConfigError, match=r"Standard input must be utf-8 text\. Got the byte 0xe9"):
        list(_lines())
