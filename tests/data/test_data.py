"""Documents, tokens and batches, each checked against what it must hold; no network."""

import itertools
import json
import sys
import types

import pytest
import torch
from tokenizers_of_tests import byte_tokenizer

from hf_rfa.data import Document, evaluation_windows, load_documents, sequences, tokenize_documents, training_batches
from hf_rfa.data.document_batches import IGNORED, carried_batches, packed_batches
from hf_rfa.data.documents import TokenStream, check_tokenizer
from hf_rfa.data.stdlib_corpus import HELD_OUT_MODULES, stdlib_documents
from hf_rfa.errors import ConfigError

# --- the standard library -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib_splits() -> dict[str, list[Document]]:
    return {split: load_documents("stdlib", split) for split in ("train", "validation")}


def test_stdlib_splits_are_sorted_and_disjoint(stdlib_splits):
    train, validation = stdlib_splits["train"], stdlib_splits["validation"]
    assert [document.name for document in validation] == sorted(HELD_OUT_MODULES)
    names = [document.name for document in train]
    assert names == sorted(names)
    assert not set(names) & set(HELD_OUT_MODULES)
    assert not {document.text for document in train} & {document.text for document in validation}


def test_stdlib_holds_sources_and_prose_but_no_tests_tables_or_build_machine(stdlib_splits):
    names = [document.name for document in stdlib_splits["train"]]
    assert {"json/decoder.py", "threading.py", "pydoc_data/topics/lambda"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "turtledemo"}
    assert not any("_sysconfigdata" in name or "config-" in name for name in names)
    topic = next(document.text for document in stdlib_splits["train"] if document.name == "pydoc_data/topics/lambda")
    assert topic.startswith("Lambdas\n*******\n")  # decoded, not a literal with escapes
    assert all(document.text.strip() for document in stdlib_splits["train"])


def test_stdlib_validation_documents_are_long(stdlib_splits):
    assert all(len(document.text) > 50_000 for document in stdlib_splits["validation"])


def test_stdlib_without_sources_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no train sources.*pass a folder of text files"):
        stdlib_documents("train", tmp_path)


# --- local files ----------------------------------------------------------------------------------------------------


def write_texts(folder, count):
    for i in range(count):
        (folder / f"{i:02d}.txt").write_text(f"text {i}")


def test_folder_holds_out_its_last_tenth(tmp_path):
    write_texts(tmp_path, 20)
    train, validation = load_documents(tmp_path, "train"), load_documents(tmp_path, "validation")
    assert [document.name for document in train] == [f"{i:02d}.txt" for i in range(18)]
    assert validation == [Document("18.txt", "text 18"), Document("19.txt", "text 19")]


def test_two_documents_still_leave_one_for_each_split(tmp_path):
    write_texts(tmp_path, 2)
    assert [document.name for document in load_documents(str(tmp_path), "train")] == ["00.txt"]
    assert [document.name for document in load_documents(str(tmp_path), "validation")] == ["01.txt"]


def test_single_document_is_cut(tmp_path):
    file = tmp_path / "novel.md"
    text = "".join(f"{i:04d}" for i in range(250))
    file.write_text(text)
    (train,), (validation,) = load_documents(file, "train"), load_documents(file, "validation")
    assert train.text + validation.text == text
    assert len(validation.text) == 100


@pytest.mark.parametrize("layout", ["folders", "files"])
def test_own_validation_split_is_used(tmp_path, layout):
    rows = {"train": ["a", "b", "c"], "validation": ["d"]}
    for split, texts in rows.items():
        if layout == "folders":
            (tmp_path / split).mkdir()
            for text in texts:
                (tmp_path / split / f"{text}.txt").write_text(text)
        else:
            (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for split, texts in rows.items():
        assert [document.text for document in load_documents(tmp_path, split)] == texts


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    texts = [f"row {i}\n\tindented, ü" for i in range(10)]
    jsonl, parquet = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    jsonl.write_text("\n".join(json.dumps({"body": text, "id": i}) for i, text in enumerate(texts)) + "\n\n")
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    pyarrow_parquet.write_table(pyarrow.table({"body": texts, "id": list(range(10))}), parquet)
    for split, expected in (("train", texts[:9]), ("validation", texts[9:])):
        for file in (jsonl, parquet):
            assert [document.text for document in load_documents(file, split, text_column="body")] == expected


def test_max_documents_and_blank_documents(tmp_path):
    write_texts(tmp_path, 20)
    (tmp_path / "00.txt").write_text(" \n\n")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    assert [document.name for document in load_documents(tmp_path, "train", max_documents=2)] == ["01.txt", "02.txt"]


def test_same_call_same_documents(tmp_path):
    (tmp_path / "b").mkdir()
    write_texts(tmp_path, 3)
    write_texts(tmp_path / "b", 3)
    first = load_documents(tmp_path, "train")
    assert [document.name for document in first] == ["00.txt", "01.txt", "02.txt", "b/00.txt", "b/01.txt"]
    assert first == load_documents(tmp_path, "train")


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_unknown_split():
    with pytest.raises(ValueError, match=r"`split` must be one of train, validation\. Got 'test'"):
        load_documents("stdlib", "test")


def test_max_documents_below_one():
    with pytest.raises(ValueError, match=r"`max_documents` must be at least 1\. Got 0"):
        load_documents("stdlib", "train", max_documents=0)


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/such/folder", "missing.parquet"])
def test_missing_path(name):
    with pytest.raises(FileNotFoundError, match=r"No file or folder at .*missing|folder"):
        load_documents(name, "train")


def test_folder_without_text(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"0")
    with pytest.raises(FileNotFoundError, match=r"has no file ending in \.txt, \.md, \.py, \.jsonl, \.parquet"):
        load_documents(tmp_path, "train")


def test_unknown_file_type(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"Got '\.pdf', supported: \.txt"):
        load_documents(tmp_path / "a.pdf", "train")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_empty_documents(tmp_path, split):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=rf"The {split} split of .* has no text"):
        load_documents(tmp_path, split)


def test_missing_text_column_names_the_columns(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"content": "a", "id": 1}\n')
    with pytest.raises(
        ValueError, match=r"line 1 has no column 'text'\. Its columns are 'content', 'id'\. Set `text_c"
    ):
        load_documents(tmp_path, "train")


def test_text_column_of_numbers(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"Column 'text' of .*rows\.jsonl, line 3 must be text\. Got int"):
        load_documents(tmp_path, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"must be one JSON object\. It is not: Expecting value behind \d+ characters\."),
        ('["a"]', r"must be one JSON object\. Got '\[\"a\"\]"),
        ('{"text": "a", "n": ' + 5000 * "1" + "}", r"cannot be read: .*digits"),
        ('{"text": ' + 100_000 * "[", r"cannot be read: .*recursion"),
    ],
)
def test_broken_jsonl_names_file_and_line(tmp_path, line, message):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "rows.jsonl").write_text('{"text": "a"}\n' + line + '\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match=rf"part/rows\.jsonl, line 2 {message}"):
        load_documents(tmp_path, "train")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl"])
def test_what_is_not_utf_8_is_refused_by_file_and_line(tmp_path, name, encoding):
    (tmp_path / name).write_bytes('{"text": "cafe"}\n{"text": "café"}\n'.encode(encoding))
    line, byte = {"latin-1": (2, "0xe9"), "utf-16": (1, "0xff")}[encoding]
    with pytest.raises(ConfigError, match=rf"{name}, line {line} must be UTF-8 text\. Got the byte {byte} .*iconv"):
        load_documents(tmp_path, "train")


def test_byte_order_marks_and_ends_of_lines_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\nb\rc\n".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "é"}\r\n{"text": "b"}\n'.encode())
    (tmp_path / "validation.txt").write_text("held out")
    assert [document.text for document in load_documents(tmp_path, "train")] == ["é\nb\nc\n", "é", "b"]


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\ud83d\\ude00"}\n{"text": "a\\ud83d"}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 2 must be text\. Got '\\ud83d', half"):
        load_documents(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"no parquet"])
def test_damaged_parquet_is_named(tmp_path, content):
    pytest.importorskip("datasets")
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"rows\.parquet cannot be read as Parquet: .*[^.]\. The file is damaged"):
        load_documents(tmp_path, "train")


# --- the hub, without it --------------------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(monkeypatch):
    """Puts splits, or an exception to raise, in place of `datasets.load_dataset`; records its arguments."""
    calls: list[tuple] = []

    def install(answer):
        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        return calls

    return install


def test_hub_holds_out_every_tenth_row_and_stops_early(fake_hub):
    calls = fake_hub({"train": ({"text": f"row {i}"} for i in itertools.count())})
    documents = load_documents("owner/name:config", "validation", max_documents=2)
    assert documents == [Document("owner/name:9", "row 9"), Document("owner/name:19", "row 19")]
    assert calls == [(("owner/name", "config"), {"streaming": True})]


def test_hub_uses_the_validation_split_it_has(fake_hub):
    fake_hub({"train": [{"text": str(i)} for i in range(20)], "validation": [{"text": "held out"}]})
    assert len(load_documents("owner/name", "train")) == 20
    assert [document.text for document in load_documents("owner/name", "validation")] == ["held out"]


def test_unreachable_hub(fake_hub):
    fake_hub(ConnectionError("Couldn't reach 'owner/name' on the Hub"))
    with pytest.raises(
        ConnectionError, match=r"Could not load .*'owner/name' .*Check its name and the network.*stdlib"
    ):
        load_documents("owner/name", "train")


@pytest.mark.parametrize(
    "reason", [ValueError("Config name is missing."), RuntimeError("Dataset scripts are no longer supported.")]
)
def test_hub_dataset_without_a_configuration_or_with_a_script(fake_hub, reason):
    fake_hub(reason)
    with pytest.raises(
        ConfigError, match=rf"'owner/name' cannot be loaded: {reason} Name .* 'owner/name:CONFIG.*parquet"
    ):
        load_documents("owner/name", "train")


def test_hub_dataset_without_the_split(fake_hub):
    fake_hub({"test": []})
    with pytest.raises(ValueError, match=r"no split 'train'\. Its splits are test"):
        load_documents("owner/name", "train")


def test_datasets_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_rfa\[train\]'"):
        load_documents("owner/name", "train")


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_tokenize_documents_starts_with_bos_and_counts_bytes(recwarn):
    text = "def f():\n    return 'ü'\n"  # longer than the tokenizer's model_max_length of 16
    token_lists, num_bytes = tokenize_documents(byte_tokenizer(bos_token="<s>"), [Document("a", text)])
    assert token_lists[0].dtype == torch.long
    assert token_lists[0][0] == 0
    assert num_bytes == [len(text.encode())] == [len(token_lists[0]) - 1]
    assert not recwarn.list


def test_tokenize_documents_without_bos():
    tokenizer = byte_tokenizer()
    token_lists, num_bytes = tokenize_documents(tokenizer, [Document("a", "ab"), Document("b", "c")])
    assert [tokenizer.decode(ids) for ids in token_lists] == ["ab", "c"]
    assert num_bytes == [2, 1]


# --- evaluation windows ---------------------------------------------------------------------------------------------


def test_evaluation_windows_stay_inside_documents():
    windows = evaluation_windows([torch.arange(0, 25), torch.arange(100, 105), torch.arange(200, 210)], 10)
    assert windows[:, 0].tolist() == [0, 10, 200]
    assert (windows.diff(dim=1) == 1).all()


def test_evaluation_windows_are_spread():
    windows = evaluation_windows([torch.arange(1000)], 10, max_windows=4)
    assert windows[:, 0].tolist() == [0, 250, 500, 750]


def test_no_document_reaches_the_context():
    with pytest.raises(ValueError, match=r"No document reaches the context of 64 tokens: the longest has 30"):
        evaluation_windows([torch.arange(30), torch.arange(20)], 64)


# --- training batches -----------------------------------------------------------------------------------------------


def test_training_batches_are_deterministic_and_endless():
    token_lists = [torch.arange(100), torch.arange(100, 1000)]
    first, second, other = (training_batches(token_lists, 32, 3, seed) for seed in (0, 0, 1))
    drawn = list(itertools.islice(first, 50))
    assert all(torch.equal(a, b) for a, b in zip(drawn, second, strict=False))
    assert not torch.equal(drawn[0], next(other))
    assert drawn[0].shape == (3, 32)
    assert drawn[0].dtype == torch.long


def test_training_batches_do_not_touch_the_global_generator():
    state = torch.random.get_rng_state()
    next(training_batches([torch.arange(500)], 200, 2, 0, repeat_probability=1.0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_batches_cover_all_documents_across_their_borders():
    token_lists = [torch.arange(40), torch.arange(40, 60)]
    starts = {int(row[0]) for batch in itertools.islice(training_batches(token_lists, 16, 8, 0), 100) for row in batch}
    assert starts == set(range(60 - 16 + 1))
    for batch in itertools.islice(training_batches(token_lists, 16, 8, 0), 10):
        assert (batch.diff(dim=1) == 1).all()


def test_text_is_not_changed_by_planting():
    ids = torch.arange(3000)
    for _ in itertools.islice(training_batches([ids], 512, 4, 0, repeat_probability=1.0), 20):
        pass
    assert torch.equal(ids, torch.arange(3000))


@pytest.mark.parametrize("context", [128, 200, 512, 2048])
def test_planted_repeats_are_copies_from_beyond_the_window(context):
    distances, planted = [], 0
    # Every token of the text is another number: a token seen before is a planted one, and shows where it came from.
    for batch in itertools.islice(training_batches([torch.arange(50_000)], context, 8, 0, repeat_probability=1.0), 40):
        for row in batch.tolist():
            seen: dict[int, int] = {}
            here = []
            for position, token in enumerate(row):
                if token in seen:
                    here.append(position - seen[token])
                seen.setdefault(token, position)
            planted += bool(here)
            distances += here
            if here:
                assert len(here) >= sequences.REPEAT_SPAN[0] // 2  # a later repeat may cover part of an earlier one
    assert planted > 0.95 * 8 * 40
    # A few come closer: two repeats of one span, of which the first stands where the original was.
    near = sum(distance <= sequences.REPEAT_MIN_GAP for distance in distances)
    assert near < 0.02 * len(distances)
    assert max(distances) > 0.7 * context


def test_share_of_sequences_with_repeats():
    batches = training_batches([torch.arange(50_000)], 256, 16, 0, repeat_probability=0.5)
    rows = [row for batch in itertools.islice(batches, 60) for row in batch]
    share = sum(len(row.unique()) < len(row) for row in rows) / len(rows)
    assert 0.45 < share < 0.55


@pytest.mark.parametrize("context", [160, 640, 2048])
def test_loops_repeat_a_span_of_text_until_the_context_is_full(context):
    periods = []
    for batch in itertools.islice(training_batches([torch.arange(50_000)], context, 8, 0, loop_probability=1.0), 40):
        for row in batch:
            period = len(row.unique())  # every token of the text is another number
            assert torch.equal(row[period:], row[:-period])
            assert (row[:period].diff() == 1).all()
            periods.append(period)
    assert min(periods) >= sequences.LOOP_SHORTEST
    assert max(periods) <= sequences.LOOP_LONGEST * context
    if context > 160:  # at 160 there is but one period
        middle = (sequences.LOOP_SHORTEST + sequences.LOOP_LONGEST * context) / 2
        spread = (sequences.LOOP_LONGEST * context - sequences.LOOP_SHORTEST) / 12**0.5
        assert abs(sum(periods) / len(periods) - middle) < 4 * spread / len(periods) ** 0.5


def test_loops_have_twice_the_repeated_tokens_of_planted_repeats():
    def repeated(**probability):
        batches = training_batches([torch.arange(50_000)], 640, 8, 0, **probability)
        rows = torch.cat(list(itertools.islice(batches, 100)))
        return 1 - sum(len(row.unique()) for row in rows) / rows.numel()

    assert repeated(loop_probability=1.0) == pytest.approx(0.5, abs=0.03)
    assert repeated(repeat_probability=1.0) == pytest.approx(0.25, abs=0.03)


def test_share_of_loops_and_no_repeats_planted_in_them():
    batches = training_batches([torch.arange(50_000)], 512, 16, 0, repeat_probability=1.0, loop_probability=0.5)
    rows = [row for batch in itertools.islice(batches, 60) for row in batch]
    periods = [len(row.unique()) for row in rows]
    loops = [p for row, p in zip(rows, periods, strict=True) if torch.equal(row[p:], row[:-p])]
    assert 0.45 < len(loops) / len(rows) < 0.55
    assert max(periods) < 512  # the others have planted repeats


def test_batches_without_loops_are_those_of_versions_that_had_none():
    batch = next(training_batches([torch.arange(5000)], 256, 2, 7, repeat_probability=0.5))
    assert batch[:, 0].tolist() == [4465, 2027]


def test_context_longer_than_all_tokens():
    with pytest.raises(ValueError, match=r"hold 30 tokens together, fewer than one sequence of 64"):
        training_batches([torch.arange(20), torch.arange(10)], 64, 1, 0)


def test_no_documents_to_draw_from():
    with pytest.raises(ValueError, match=r"hold 0 tokens together"):
        training_batches([], 64, 1, 0)


@pytest.mark.parametrize("name", ["repeat_probability", "loop_probability"])
@pytest.mark.parametrize("probability", [-0.1, 1.5])
def test_probability_out_of_range(name, probability):
    with pytest.raises(ValueError, match=rf"`{name}` must be in \[0, 1\]\. Got {probability}"):
        training_batches([torch.arange(2000)], 512, 1, 0, **{name: probability})


def test_context_too_short_for_a_loop():
    with pytest.raises(ValueError, match=r"A context of 159 tokens has no room for a loop .* at least 160"):
        training_batches([torch.arange(2000)], 159, 1, 0, loop_probability=0.5)


def test_context_too_short_for_a_repeat():
    with pytest.raises(ValueError, match=r"A context of 100 tokens has no room .* at least 128"):
        training_batches([torch.arange(2000)], 100, 1, 0, repeat_probability=0.5)


@pytest.mark.parametrize(("context", "batch_size"), [(0, 4), (16, 0)])
def test_sizes_below_one(context, batch_size):
    with pytest.raises(ValueError, match=rf"must be at least 1\. Got {context} and {batch_size}"):
        training_batches([torch.arange(100)], context, batch_size, 0)


# --- whole documents: packed, or cut with the state carried over ----------------------------------------------------


def numbered(*lengths: int) -> list[torch.Tensor]:
    """Documents whose token ids say which one and where: 1000, 1001, ...; 2000, 2001, ..."""
    return [1000 * (number + 1) + torch.arange(length) for number, length in enumerate(lengths)]


def test_packed_targets_and_positions_stay_in_their_document():
    batches = itertools.islice(packed_batches(numbered(5, 30, 1, 13), context=16, batch_size=2, seed=3), 8)
    seen = set()
    for batch in batches:
        assert batch.input_ids.shape == batch.targets.shape == batch.position_ids.shape == (2, 16)
        predicted = batch.targets != IGNORED
        assert torch.equal(batch.targets[predicted], batch.input_ids[predicted] + 1)
        ends = batch.input_ids[~predicted]
        assert set(ends.tolist()) <= {1004, 2029, 4012}  # only a document's last token predicts nothing
        starts = batch.position_ids == 0
        same = batch.input_ids[:, 1:] == batch.input_ids[:, :-1] + 1
        assert torch.equal(~starts[:, 1:], same)  # one position run for each document
        seen |= set(batch.input_ids.flatten().tolist())
    assert seen == {*range(1000, 1005), *range(2000, 2030), *range(4000, 4013)}


def test_carried_rows_walk_through_whole_documents():
    documents = numbered(40, 17, 9, 2)
    rows: dict[tuple[int, int], list[int]] = {}
    for number, batch in enumerate(
        itertools.islice(carried_batches(documents, context=8, batch_size=2, seed=1, lanes=3), 60)
    ):
        for row in range(2):
            walk = rows.setdefault((number % 3, row), [])
            ids, targets = batch.input_ids[row], batch.targets[row]
            predicted = targets != IGNORED
            assert torch.equal(targets[predicted], ids[predicted] + 1)
            assert torch.equal(batch.position_ids[row][predicted], ids[predicted] % 1000)
            assert bool(batch.fresh[row]) == (int(ids[0]) % 1000 == 0)
            if not batch.fresh[row]:
                assert int(ids[0]) == walk[-1]  # goes on where the row stopped
            walk += targets[predicted].tolist()
    for walk in rows.values():  # every token but the first of a document is predicted exactly once, in order
        for end in (i for i, token in enumerate(walk[:-1]) if walk[i + 1] != token + 1):
            assert walk[end] in {1039, 2016, 3008, 4001}


def test_batches_of_documents_repeat_and_refuse_what_cannot_be():
    first, again = (next(packed_batches(numbered(50, 60), context=16, batch_size=2, seed=5)) for _ in range(2))
    assert torch.equal(first.input_ids, again.input_ids)
    with pytest.raises(ConfigError, match="two tokens"):
        next(packed_batches(numbered(1, 1), context=16, batch_size=1))
    with pytest.raises(ConfigError, match="`context`"):
        packed_batches(numbered(50), context=1, batch_size=1)
    with pytest.raises(ConfigError, match="`lanes`"):
        carried_batches(numbered(50), context=8, batch_size=1, lanes=0)


def test_a_stream_reads_one_document_at_a_time_and_again(tmp_path):
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": f"book {i}"}) + "\n" for i in range(20)))
    tokenizer = byte_tokenizer(bos_token="<s>")
    stream = TokenStream(tokenizer, tmp_path, "train")
    first, again = list(stream), list(stream)
    assert [tokenizer.decode(ids[1:]) for ids in first] == [f"book {i}" for i in range(18)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    batch = next(packed_batches(stream, context=32, batch_size=1))
    assert batch.input_ids[0, 0] == tokenizer.bos_token_id


def test_a_tokenizer_of_another_model_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="258 tokens, the model embeddings for 128"):
        check_tokenizer(byte_tokenizer(), tiny_llama)
