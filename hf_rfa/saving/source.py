"""`Source`: a folder or a hub repository, with the hub options for finding its files."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from hf_rfa.errors import CheckpointError

#: Options for access to the hub, the same for every repository.
_ACCESS = ("cache_dir", "token", "local_files_only", "force_download", "proxies")
#: Options for a place in one repository.
_PLACE = ("revision", "subfolder")
#: Options for models whose code lies beside their weights.
_CODE = ("trust_remote_code", "code_revision")
HUB_OPTIONS = (*_ACCESS, *_PLACE, *_CODE)
_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


@dataclass(frozen=True)
class Source:
    """Where a model lies. All loading goes through one, so that every file is found with the caller's options.

    Attributes:
        name: A folder, or a hub id.
        hub: The options that the caller gave, of `cache_dir`, `token`, `local_files_only`, `force_download`,
            `proxies`, `revision` and `subfolder`.
        code: The same of `trust_remote_code` and `code_revision`.
        commit: The commit of the revision, so that a branch that moves meanwhile does not mix two states.

    Example:
        >>> print(Source.of("me/repo", {"revision": "v1", "dtype": "float32"}))
        'me/repo' (revision 'v1')
    """

    name: str
    hub: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None

    @classmethod
    def of(cls, name: str | Path, options: Mapping[str, Any]) -> "Source":
        """The source that the keyword arguments of a `from_pretrained` describe; other arguments are ignored."""
        given = {key: value for key, value in options.items() if value is not None}
        return cls(
            str(name),
            {key: given[key] for key in (*_ACCESS, *_PLACE) if key in given},
            {key: given[key] for key in _CODE if key in given},
        )

    def __str__(self) -> str:
        place = [f"{key} {self.hub[key]!r}" for key in _PLACE if self.hub.get(key)]
        return f"{self.name!r} ({', '.join(place)})" if place else repr(self.name)

    @property
    def folder(self) -> Path | None:
        """The folder on this machine; None for a hub repository."""
        root = Path(self.name)
        return root / (self.hub.get("subfolder") or "") if root.is_dir() else None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments that make any `from_pretrained` read the same place."""
        return dict(self.hub) if self.commit is None else {**self.hub, "revision": self.commit}

    def elsewhere(self, name: str, revision: str | None, subfolder: str | None) -> "Source":
        """Another repository or folder with the same access options, but its own revision and subfolder."""
        access = {key: self.hub[key] for key in _ACCESS if key in self.hub}
        place = {key: value for key, value in (("revision", revision), ("subfolder", subfolder)) if value}
        return Source(name, {**access, **place}, self.code)

    def find(self, file: str) -> Path | None:
        """The file; None if it is not there.

        Raises:
            CheckpointError: There is no such folder, repository or revision, or the hub cannot be reached.
        """
        if self.folder is not None:
            path = self.folder / file
            return path if path.exists() else None
        if Path(self.name).exists() or self.name.startswith((".", "/", "~")):
            raise CheckpointError(
                f"{self.name!r} is not a folder. Pass the folder that `hf_rfa.save_pretrained` wrote, or a hub id."
            )
        try:
            found = cached_file(self.name, file, _raise_exceptions_for_missing_entries=False, **self.options)
        except OSError as error:
            raise CheckpointError(f"Cannot find {self}: there is no such folder, and on the hub: {error}") from error
        return Path(found) if found else None

    def pinned(self, file: Path) -> "Source":
        """This source, at the commit that one of its files was found in."""
        commit = _COMMIT.search(str(file)) if self.folder is None else None
        return self if commit is None else dataclasses.replace(self, commit=commit.group(1))
