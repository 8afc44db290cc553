"""Settings (`hf_rfa.options`) from a YAML file and the command line, with one parser for all scripts."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hf_rfa.errors import ConfigError
from hf_rfa.options import Settings, help_text, near_names, options_of
from hf_rfa.text_files import read_text
from hf_rfa.value_types import describe, holds_list

_Settings = TypeVar("_Settings", bound=Settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: The file is not UTF-8, not YAML, or not a mapping.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is no YAML file: {error}. Write lines such as `steps: 100`.") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{str(path)!r} must hold keys and values. Got {found!r}. Write lines such as `steps: 100`.")
    return found


def parse_arguments(settings: type[_Settings], arguments: Sequence[str], description: str | None = None) -> _Settings:
    """Settings from a YAML file, if the first argument is one; options of the command line override it.

    Each option can be written `--name value`, `--name=value` and with dashes for underscores; values of a list are
    separated by spaces or commas; `--flag` alone is `true`, `--no_flag` is `false`.

    Raises:
        ConfigError: As `Settings.from_dict`.
    """
    arguments, given, source = list(arguments), {}, "The command line"
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        source = arguments.pop(0)
        given = read_yaml(Path(source))
    said, rest = _parser(settings, description).parse_known_args([_underscored(word) for word in arguments])
    if rest:
        names = [word.partition("=")[0].removeprefix("--") for word in rest if word.startswith("--")]
        raise ConfigError(
            f"The command line has unknown words: {rest}. {near_names(names, list(options_of(settings)))}"
        )
    return settings.from_dict(given | vars(said), source=source)


def _underscored(word: str) -> str:
    """`--max-steps=5` as `--max_steps=5`."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _parser(settings: type[Settings], description: str | None) -> argparse.ArgumentParser:
    """A parser that leaves values as text: `Settings.from_dict` reads and checks them, whatever their origin."""
    parser = _Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, usage="%(prog)s [FILE.yaml] [--option value ...]",
    )  # fmt: skip
    groups: dict[str | None, Any] = {None: parser}
    for name, each in options_of(settings).items():
        if each.group not in groups:
            groups[each.group] = parser.add_argument_group(each.group)
        text = help_text(each).replace("%", "%%")
        kind: dict[str, Any] = {"metavar": describe(each.kind, short=True)}
        if each.kind is bool:
            kind |= {"nargs": "?", "const": "true"}
            off: dict[str, Any] = {"action": "store_const", "const": "false", "help": argparse.SUPPRESS}
            groups[each.group].add_argument(f"--no_{name}", dest=name, **off)
        elif holds_list(each.kind):
            kind |= {"nargs": "*", "action": _Joined}
        groups[each.group].add_argument(f"--{name}", help=text, **kind)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"The command line cannot be read: {message}. Ask for the options by --help.")


class _Joined(argparse.Action):
    """Joins several words of a list by commas."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        setattr(namespace, self.dest, ",".join(values))
