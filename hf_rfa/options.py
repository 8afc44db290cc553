"""Settings as dataclasses: each option is defined once, as a field; checks, files and command lines follow from it.

    @dataclass(frozen=True)
    class Run(Settings):
        model: str = option("Folder or hub id.")
        tuning: FinetuneConfig = part(FinetuneConfig(steps=100, schedule="wsd"), group="Fine-tuning")

    Run(model="m", steps=0)  # ConfigError: `steps` must be ... Got 0. ...
    Run.from_dict({"model": "m", "steps": "5"})  # reads strings, as `command_line.parse_arguments` passes them

A part is a dataclass whose fields become options of the whole, in YAML files and in `to_dict` too. The instance given
holds the defaults.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Self, get_type_hints

from hf_rfa.errors import ConfigError
from hf_rfa.value_types import convert, describe, plain

#: Bounds that a field may have, with their signs and checks.
BOUNDS = {
    "least": (">=", lambda value, bound: value >= bound),
    "above": (">", lambda value, bound: value > bound),
    "most": ("<=", lambda value, bound: value <= bound),
    "below": ("<", lambda value, bound: value < bound),
}


def option(help: str, default: Any = MISSING, *, group: str | None = None, **bounds: float) -> Any:
    """A field with a help text; without a default it is required.

    Args:
        group: Heading in the help.
        bounds: `least`, `above`, `most`, `below`.
    """
    unknown = set(bounds) - set(BOUNDS)
    if unknown:
        raise TypeError(f"A bound must be one of {list(BOUNDS)}. Got {sorted(unknown)}.")
    return field(default=default, metadata={"help": help, "bounds": bounds, "group": group})


def part(
    default: Any, *, group: str, only: Iterable[str] | None = None, names: Mapping[str, str] | None = None
) -> Any:
    """A field that is itself a dataclass; its fields become options of the whole.

    Args:
        default: An instance; its values are the defaults of the options.
        group: Heading in the help.
        only: The fields that become options, by default all. The others keep their values in `default`.
        names: Other names of some options, {field: option}.

    A name that the whole or an earlier part has already is the same option, and sets both.
    """
    known, renamed = [f.name for f in fields(default)], dict(names or {})
    chosen = known if only is None else list(only)
    unknown = {*chosen, *renamed} - set(known)
    if unknown:
        raise TypeError(f"A part has the fields {known}. Got {sorted(unknown)}.")
    options = {name: renamed.get(name, name) for name in known if name in chosen}
    return field(default=default, metadata={"options": options, "group": group})


@dataclass(frozen=True)
class Option:
    """One option: a field of the settings or of one of their parts."""

    name: str
    kind: Any  # its annotation
    default: Any  # MISSING if it must be given
    help: str
    group: str | None
    bounds: Mapping[str, float]
    places: tuple[tuple[str | None, str], ...]  # (part or None, field) of each value it sets

    @property
    def required(self) -> bool:
        return self.default is MISSING

    def check(self, value: Any, *, label: str | None = None, text: bool = False) -> Any:
        """The value, converted to the option's type.

        Args:
            label: Name of the option in messages.
            text: Read strings, as from a command line or a YAML file.

        Raises:
            ConfigError: The value has another type or is out of bounds.
        """
        try:
            found = convert(self.kind, value, text=text)
        except ValueError:
            found = MISSING
        numbers = isinstance(found, (int, float)) and not isinstance(found, bool)
        kept = not numbers or all(BOUNDS[name][1](found, bound) for name, bound in self.bounds.items())
        if found is MISSING or not kept:
            bounds = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in self.bounds.items())
            what = describe(self.kind, bounds)
            raise ConfigError(f"`{label or self.name}` must be {what}. Got {value!r}. {self._advice()}")
        return found

    def _advice(self) -> str:
        if self.required:
            return f"Set it to, for example, {self.bounds['least']}." if "least" in self.bounds else "Set it to one."
        return f"Leave it out for its default, {shown(self.default)}."


def options_of(settings: type) -> dict[str, Option]:
    """Every option by its name, in the order of the fields; those of a part at the place of the part."""
    found: dict[str, Option] = {}
    kinds = get_type_hints(settings)
    for own in fields(settings):
        group = own.metadata["group"]
        if "options" not in own.metadata:
            found[own.name] = _option(own, own.name, kinds[own.name], own.default, group, (None, own.name))
            continue
        default: Any = own.default
        inner_kinds = get_type_hints(type(default))
        for each in fields(default):
            name, place = own.metadata["options"].get(each.name), (own.name, each.name)
            if name in found:
                found[name] = dataclasses.replace(found[name], places=(*found[name].places, place))
            elif name is not None:
                value = getattr(default, each.name)
                found[name] = _option(each, name, inner_kinds[each.name], value, group, place)
    return found


def _option(
    own: dataclasses.Field[Any], name: str, kind: Any, default: Any, group: str | None, place: tuple[str | None, str]
) -> Option:
    text, choices = own.metadata["help"], own.metadata.get("choices", {})
    if choices:
        text += " " + ", ".join(f"'{choice}' ({each.summary})" for choice, each in choices.items()) + "."
    return Option(name, kind, default, text, group, own.metadata.get("bounds", {}), (place,))


class Settings:
    """Base of frozen dataclasses made of `option` and `part`: checked on construction, JSON-ready."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        for each in options_of(type(self)).values():
            where, name = each.places[0]
            if where is None:
                object.__setattr__(self, name, each.check(getattr(self, name)))
        for own in fields(self):
            kind, given = type(own.default), getattr(self, own.name)
            if "options" in own.metadata and not isinstance(given, kind):
                raise ConfigError(
                    f"`{own.name}` must be of the type {kind.__name__}. Got {given!r}. Make one, or leave it out."
                )
        for name, each in options_of(type(self)).items():
            values = {_shown_place(self, place): _value_at(self, place) for place in each.places}
            if any(value != next(iter(values.values())) for value in values.values()):
                raise ConfigError(
                    f"`{name}` is one option of all that have it. Got {values}. Give them the same, or make the "
                    f"settings by `{type(self).__name__}.from_dict`, which does."
                )

    def to_dict(self) -> dict[str, Any]:
        """Every option by its name, JSON-ready."""
        return {name: plain(_value_at(self, each.places[0])) for name, each in options_of(type(self)).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "The settings", dashes: bool = False) -> Self:
        """Settings from options; strings are read, as they come from a YAML file or a command line.

        Args:
            values: {option: value}; other options have their defaults.
            source: Origin of the values, for messages.
            dashes: Write options in messages as on the command line, `--max-steps`.

        Raises:
            ConfigError: An unknown name (the message has similar ones), a missing name, or a wrong value.
        """
        known = options_of(cls)
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(f"{source} has unknown keys: {unknown}. {near_names(unknown, list(known))}")
        missing = [name for name, each in known.items() if each.required and name not in values]
        if missing:
            raise ConfigError(f"{source} must say {_listed(missing)}. Got {sorted(values)}. Set {_listed(missing)}.")
        arguments: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {own.name: {} for own in fields(cls) if "options" in own.metadata}
        for name, each in known.items():
            value = each.default
            if name in values:
                value = each.check(values[name], label=option_flag(name) if dashes else name, text=True)
            for where, target in each.places:
                (arguments if where is None else inner[where])[target] = value
        for own in fields(cls):
            if own.name in inner:
                default: Any = own.default
                arguments[own.name] = dataclasses.replace(default, **inner[own.name])
        return cls(**arguments)


def _value_at(settings: Settings, place: tuple[str | None, str]) -> Any:
    where, name = place
    return getattr(settings if where is None else getattr(settings, where), name)


def _shown_place(settings: Settings, place: tuple[str | None, str]) -> str:
    return f"{place[0] or type(settings).__name__}.{place[1]}"


def option_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def near_names(unknown: Sequence[Any], known: Sequence[str]) -> str:
    """A hint of similar names for unknown ones, and the list of all."""
    near = {name: difflib.get_close_matches(str(name), known, n=3) for name in unknown}
    hints = [f"{name!r} may be meant as {_listed(close)}" for name, close in near.items() if close]
    return (f"{'; '.join(hints)}. " if hints else "") + f"Known ones: {sorted(known)}."


def help_text(each: Option) -> str:
    """The help of one option with its default, as all command lines show it."""
    if each.default is None:  # the text says what None means
        return each.help
    return f"{each.help} ({'must be given' if each.required else f'default: {shown(each.default)}'})"


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(":".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for v in value) or "empty"
    return str(value)
