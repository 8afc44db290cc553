"""The list of all messages, the tables of options and architectures, and the page of the API, held to the package."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from paths import ROOT
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import hf_rfa
from hf_rfa.distillation.config import DistillConfig
from hf_rfa.embeddings.config import MetricConfig
from hf_rfa.errors import RFAError
from hf_rfa.registry import FEATURE_MAPS
from hf_rfa.serving.settings import ServeSettings
from hf_rfa.supported import read_matrix
from hf_rfa.training.config import FinetuneConfig

PACKAGE = Path(hf_rfa.__file__).parent
OWN = ("ConfigError", "UnsupportedModelError", "CheckpointError", "StaleStateError", "RequestError")


@pytest.fixture(scope="module")
def found():
    """The messages of the package, read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("pages.messages").messages(PACKAGE)


def literals(node: ast.AST) -> list[str]:
    """The words of a raised message as they stand in the source."""
    return [
        child.value.strip()
        for child in ast.walk(node)
        if isinstance(child, ast.Constant) and isinstance(child.value, str) and len(child.value.strip()) > 12
    ]


def test_every_message_that_is_raised_is_on_the_page(found):
    """Looked for in another way than the page is made: every raise, every string in it."""
    shown = " ".join(message.text for message in found)
    missing, seen = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            if ast.unparse(node.exc.func) in OWN:
                seen += 1
                missing += [
                    f"{path.name}:{node.lineno}: {text}" for text in literals(node.exc.args[0]) if text not in shown
                ]
    assert seen > 300
    assert not missing


def pattern(template: str) -> str:
    """A regular expression for the messages of a template."""
    words = re.split(r"\{[^{}]*\}|\[[^\[\]|]*(?:\|[^\[\]|]*)+\]|%[sd]", template)
    return ".*".join(re.escape(word) for word in words)


def tiny_t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def tiny() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))


FAULTS = {
    "num_features": lambda folder: hf_rfa.RFAConfig(num_features=0),
    "feature map": lambda folder: hf_rfa.RFAConfig(feature_map="cosine"),
    "budget": lambda folder: hf_rfa.RFAConfig(budget=2.0),
    "option": lambda folder: hf_rfa.DistillConfig(steps=0),
    "a head": lambda folder: hf_rfa.convert(tiny(), hf_rfa.RFAConfig(softmax_heads=[(0, 9)]), calibrate=False),
    "T5": lambda folder: hf_rfa.convert(tiny_t5(), calibrate=False),
    "not converted": lambda folder: hf_rfa.save_pretrained(tiny(), folder),
    "no folder": lambda folder: hf_rfa.from_pretrained(folder / "nowhere"),
    "no conversion": lambda folder: hf_rfa.from_pretrained(folder),
    "texts": lambda folder: hf_rfa.convert(tiny(), calibrate="one text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_message_as_it_is_raised_fits_a_template(fault, found, tmp_path):
    with pytest.raises(RFAError) as raised:
        FAULTS[fault](tmp_path)
    kind, text = type(raised.value).__name__, str(raised.value)
    fitting = [
        message for message in found if message.kind == kind and re.fullmatch(pattern(message.text), text, re.DOTALL)
    ]
    assert fitting, text


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/models.md"])
def test_messages_that_pages_quote_are_the_packages_own(page, found):
    text = (ROOT / page).read_text(encoding="utf-8")
    quoted = re.findall(r"`(\w+Error): ([^`]+)`", " ".join(text.split()))
    assert quoted
    for kind, words in quoted:
        templates = [message.text.replace("`", "") for message in found if message.kind == kind]
        ends = [template[: match.end()] for template in templates for match in re.finditer(r"\.(?= |$)|$", template)]
        fits = any(words in template for template in templates) or any(re.fullmatch(pattern(e), words) for e in ends)
        assert fits, words


def test_messages_are_read_from_any_source(imported, tmp_path):
    package = tmp_path / "hf_rfa"
    package.mkdir()
    (package / "room.py").write_text(
        "NAME = 'a.json'\n"
        "def check(name, value):\n"
        "    if value < 0:\n"
        "        raise ConfigError(f'`{name}` must be positive. Got {value!r}.' + (' Set 1.' if value else ''))\n"
        "check('steps', -1)\n"
        "class Room:\n"
        "    def open(self):\n"
        "        warnings.warn(f'{NAME} is old: {len(self.rows)} rows.')\n"
        "        raise ValueError(self.text)\n"
    )
    read = [(m.kind, m.place, m.text) for m in imported("pages.messages").messages(package)]
    assert read == [
        ("ConfigError", "check", "`steps` must be positive. Got {value}. Set 1."),
        ("warning", "Room.open", "a.json is old: {number of rows} rows."),
    ]


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.py", hf_rfa.RFAConfig),
        ("distillation/config.py", DistillConfig),
        ("training/config.py", FinetuneConfig),
        ("embeddings/config.py", MetricConfig),
        ("serving/settings.py", ServeSettings),
    ],
)
def test_tables_of_options_hold_every_field_and_its_default(file, settings, imported):
    rendering = imported("pages.rendering")
    asked = f"<!-- options: hf_rfa/{file} {settings.__name__} -->"
    assert asked in (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    shown = {name: (default, text) for name, default, text in rendering.fields_of(PACKAGE / file, settings.__name__)}
    fields = {field.name: field for field in dataclasses.fields(settings) if "help" in field.metadata}
    assert list(shown) == list(fields)
    for name, field in fields.items():
        default, text = shown[name]
        assert text.replace("\\", "")[:40] == field.metadata["help"][:40]
        required = field.default is dataclasses.MISSING
        assert default == "required" if required else ast.literal_eval(default.strip("`")) == field.default, name


def test_the_table_of_options_names_the_feature_maps(imported):
    fields = imported("pages.rendering").fields_of(PACKAGE / "config.py", "RFAConfig")
    text = next(text for name, _, text in fields if name == "feature_map")
    assert all(f"'{name}' ({one.summary})" in text for name, one in FEATURE_MAPS.items())


def test_the_table_of_architectures_holds_every_row(imported):
    architectures = imported("pages.rendering").architectures
    table = architectures(PACKAGE, summary=False)
    rows = read_matrix().architectures
    assert table.count("\n") == len(rows) + 1
    assert all(f"| {row.model_class} | {row.model_type} | {row.outcome} |" in table for row in rows)
    converts = sum(row.outcome == "converts" for row in rows)
    assert architectures(PACKAGE, summary=True).startswith(f"{converts} of the {len(rows)} entries")


def test_the_page_of_the_api_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: hf_rfa\.(\w+)$", text, re.MULTILINE)) == sorted(hf_rfa.__all__)


def test_list_errors_finds_by_words(capsys, imported):
    list_errors = imported("list_errors")
    list_errors.main(["num_features", "positive"])
    shown = capsys.readouterr().out
    assert "ConfigError (hf_rfa/config_checks.py, check_int)" in shown
    assert "`num_features` must be a positive integer. Got {value}." in shown
    list_errors.main(["no such words at all"])
    assert capsys.readouterr().out == ""
