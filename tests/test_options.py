"""Settings and their one parser: every field is an option, and a wrong value is named before any work."""

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.results import CompareSettings
from hf_rfa.options import Settings, option, options_of, part
from hf_rfa.training import FinetuneConfig
from hf_rfa.value_types import convert, describe

CONFIGS = [FinetuneConfig, hf_rfa.DistillConfig, CompareSettings]


@dataclass(frozen=True)
class Conversion(Settings):
    rfa: hf_rfa.RFAConfig = part(hf_rfa.RFAConfig(), group="Conversion")


def test_every_field_of_the_conversion_can_be_an_option():
    words = "--layers 0 3 --layer_features 3:512 0:32 --softmax_heads 0:1 --omega gaussian --resample 5"
    given = parse_arguments(Conversion, words.split()).rfa
    assert given == hf_rfa.RFAConfig(
        layers=[0, 3], layer_features={0: 32, 3: 512}, softmax_heads=[(0, 1)], omega="gaussian", resample=5
    )
    assert parse_arguments(Conversion, ["--layers", "every 4th stays softmax"]).rfa.layers == "every 4th stays softmax"
    assert Conversion.from_dict({"layer_features": {3: 512}}).rfa.layer_features == ((3, 512),)
    kinds = get_type_hints(hf_rfa.RFAConfig).values()
    assert Any not in kinds
    with pytest.raises(ConfigError, match=r"`omega` must be one of \['sphere', .*Got 'trained'"):
        Conversion.from_dict({"omega": "trained"})


@dataclass(frozen=True)
class Inner(Settings):
    depth: int = option("Of the well.", 3, least=1)
    seed: int = option("Of the inner part.", 0)
    hidden: int = option("Not an option of the whole.", 7)


@dataclass(frozen=True)
class Run(Settings):
    name: str = option("Of the run, 100% of it.")
    rate: float = option("Of learning.", 0.5, above=0, below=1, group="Numbers")
    sizes: tuple[int, ...] = option("Of everything.", (1, 2))
    loud: bool = option("Says more.", True)
    seed: int = option("Of everything.", 0, least=0)
    mode: Literal["fast", "slow"] = option("How.", "fast")
    limit: int | None = option("By default none.", None, least=1)
    inner: Inner = part(Inner(depth=4), group="Inside", only=("depth", "seed"), names={"depth": "inner_depth"})


def test_every_way_to_give_a_value_is_the_same(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nrate: 1e-3\nsizes: [3, 4]\nloud: false\nseed: 2\ninner_depth: 6\nlimit: 5\n")
    expected = Run("a", 1e-3, (3, 4), False, 2, limit=5, inner=Inner(depth=6, seed=2))
    assert parse_arguments(Run, [str(path)]) == expected
    words = "--name a --rate 0.001 --sizes 3 4 --loud false --seed=2 --inner-depth 6 --limit 5"
    assert parse_arguments(Run, words.split()) == expected
    words = "--name=a --rate=1e-3 --sizes=3,4 --no_loud --seed 2 --inner_depth=6 --limit 5"
    assert parse_arguments(Run, words.split()) == expected
    assert parse_arguments(Run, [str(path), "--limit", "none", "--loud"]) == dataclasses.replace(
        expected, limit=None, loud=True
    )
    assert Run.from_dict(expected.to_dict()) == expected


def test_to_dict_is_flat_and_what_is_no_option_stays():
    assert Run("a").to_dict() == {
        "name": "a", "rate": 0.5, "sizes": [1, 2], "loud": True, "seed": 0, "mode": "fast", "limit": None,
        "inner_depth": 4,
    }  # fmt: skip
    assert Run.from_dict({"name": "a"}).inner == Inner(depth=4, hidden=7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0}, r"`rate` must be a number > 0 and < 1\. Got 0\. Leave it out for its default, 0\.5\."),
        ({"rate": float("nan")}, "`rate` must be a number > 0"),
        ({"rate": "1e-3"}, r"`rate` must be a number .* Got '1e-3'"),
        ({"rate": True}, "`rate`"),
        ({"seed": 1.0}, r"`seed` must be a whole number >= 0\. Got 1\.0"),
        ({"seed": True}, "`seed`"),
        ({"name": 3}, r"`name` must be text\. Got 3\. Set it to one\."),
        ({"sizes": 3}, "`sizes` must be whole numbers with commas between"),
        ({"sizes": (3, 0.5)}, "`sizes`"),
        ({"loud": 1}, "`loud` must be true or false"),
        ({"mode": "medium"}, r"`mode` must be one of \['fast', 'slow'\]\. Got 'medium'"),
        ({"limit": 0}, r"`limit` must be a whole number >= 1 or none\. Got 0"),
        ({"inner": 3}, "`inner` must be of the type Inner. Got 3"),
        ({"seed": 1}, r"`seed` is one option .* Got \{'Run.seed': 1, 'inner.seed': 0\}.*Run\.from_dict"),
    ],
)
def test_wrong_types_and_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        Run(**{"name": "a", **values})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "fast"], "`rate` must be a number > 0 and < 1. Got 'fast'"),
        (["--loud=perhaps"], "`loud` must be true or false"),
        (["--sizes", "1", "x"], "`sizes` must be whole numbers with commas between. Got '1,x'"),
        (["--inner_depth", "0"], "`inner_depth` must be a whole number >= 1. Got '0'"),
        (["--ratte", "1"], r"unknown words: \['--ratte', '1'\]\. 'ratte' may be meant as `rate`\. Known ones"),
        (["--rat", "0.1"], "unknown words"),  # no abbreviations: a later option would change what they mean
        (["stray"], r"unknown words: \['stray'\]"),
        (["--rate"], "expected one argument"),
        (["--hidden", "3"], "unknown words"),
    ],
)
def test_wrong_words_on_the_command_line_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_arguments(Run, ["--name", "a", *words])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: a\n", r"unknown keys: \['nmae'\]\. 'nmae' may be meant as `name`\."),
        ("name: a\n1: b\n", r"unknown keys: \[1\]\. Known ones"),
        ("rate: 0.5\n", "must say `name`"),
        ("- a\n", "must hold keys and values"),
        ("a: [\n", "is no YAML file"),
        ("name: a\nrate: 3\n", "`rate` must be a number > 0 and < 1. Got 3"),
        ("name: a\nseed: yes\n", "`seed` must be a whole number"),
    ],
)
def test_wrong_yaml_files_are_named(tmp_path, text, message):
    path = tmp_path / "run.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_arguments(Run, [str(path)])


def test_a_yaml_file_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "run.yml"
    path.write_bytes("rate: 0.5\nname: café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yml, line 2 must be UTF-8 text\. Got the byte 0xe9"):
        parse_arguments(Run, [str(path)])


def test_the_help_has_every_text_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(Run, ["--help"], "What it does.")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "What it does.", "--name str Of the run, 100% of it. (must be given)", "(default: 1,2)", "(default: true)",
        "Numbers: --rate float", "Inside: --inner_depth int Of the well. (default: 4)", "--mode fast|slow How.",
        "--limit int|none By default none. Numbers:",
    ):  # fmt: skip
        assert text in shown
    assert "hidden" not in shown


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_the_package_is_an_option_with_a_help_text_and_a_type(config, capsys):
    found = options_of(config)
    own = {f.name for f in dataclasses.fields(config) if "options" not in f.metadata}
    assert own <= set(found)
    assert all(len(each.help) > 10 for each in found.values())
    assert Any not in get_type_hints(config).values()
    with pytest.raises(SystemExit):
        parse_arguments(config, ["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in found)
    # Each default can be written as the help shows it, and comes back as it is.
    required = {name: "1" for name, each in found.items() if each.required}
    defaults = config.from_dict(required)
    assert config.from_dict(defaults.to_dict()) == defaults
    wrong = {name for name in found if not _takes(config, required | {name: {"no": "value"}})}
    assert wrong == set(found)


def _takes(config, values):
    try:
        config.from_dict(values)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("config", [FinetuneConfig, hf_rfa.DistillConfig])
def test_a_config_is_frozen_and_takes_a_path(config, tmp_path):
    made = config(steps=2, output=tmp_path)
    assert made.output == tmp_path
    assert made.to_dict()["output"] == str(tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.steps = 3


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (str | None, "none", None),
        (str | Path | None, "folder", "folder"),
        (Literal["auto"] | float | Sequence[tuple[int, int]] | None, "auto", "auto"),
        (Literal["auto"] | float | Sequence[tuple[int, int]] | None, "3:1, 0:0", ((3, 1), (0, 0))),
        (Literal["never"] | int, "2", 2),
        (Mapping[int, int] | Sequence[tuple[int, int]] | None, "3:512,1:64", ((3, 512), (1, 64))),
        (Mapping[int, int] | Sequence[tuple[int, int]] | None, {"3": "512"}, {3: 512}),
        (Mapping[int, int], "3:512", {3: 512}),
        (Literal["all"] | Sequence[int] | str, "all", "all"),
        (Literal["all"] | Sequence[int] | str, "0,3", (0, 3)),
        (Literal["all"] | Sequence[int] | str, "every 4th stays softmax", "every 4th stays softmax"),
        (tuple[str, ...], "", ()),
        (bool, "Yes", True),
        (Literal[1, 2], "2", 2),
    ],
)
def test_texts_are_read_as_the_narrowest_type(kind, text, value):
    assert convert(kind, text, text=True) == value


def test_text_is_no_number_where_nothing_is_read():
    with pytest.raises(ValueError, match="3"):
        convert(int | None, "3", text=False)
    assert convert(float, 3, text=False) == 3.0
    assert describe(tuple[tuple[int, int], ...], short=True) == "int:int,..."


#: The operator on plain tensors names each of its arguments; everything inside takes the objects made of them.
PLAIN = ("rfa_attention", "rfa_attention_reference")


def is_kernel(node):
    """Whether it is compiled for a GPU, whose programs take pointers and sizes and no objects."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def test_no_function_has_more_than_10_parameters():
    package = Path(hf_rfa.__file__).parent
    long = []
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in PLAIN and not is_kernel(node):
                given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([a for a in given if a not in ("self", "cls")]) > 10:
                    long.append(f"{name}: {node.name}")
    assert not long


def test_a_bound_or_a_field_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="minimum"):
        option("x", 1, minimum=0)
    with pytest.raises(TypeError, match="'depht'"):
        part(Inner(), group="Inside", only=("depht",))
    with pytest.raises(TypeError, match="'depht'"):
        part(Inner(), group="Inside", names={"depht": "inner_depth"})
