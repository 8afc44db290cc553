"""Verdicts, and the folder that keeps them from process to process: one file each, beside what Triton has compiled."""

import dataclasses
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from hf_rfa.ops.first_use.kind import Kind


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check of the kernels found.

    Attributes:
        failed: The check that failed: "compiling", "memory", or what is wrong by more than its limit, such as "output"
            or "gradient of key"; "" if none did.
        detail: What failed in words: the error's message, or the numbers.
        error: The largest relative error of outputs and gradients, beside the form in PyTorch; None if not measured.
        speed: How many times as fast as that form the kernels were, in the passes that come off worst; None likewise.
    """

    failed: str = ""
    detail: str = ""
    error: float | None = None
    speed: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the kernels may be used: their numbers are right, and they are faster."""
        return not self.failed and self.speed is not None and self.speed > 1

    @property
    def lasting(self) -> bool:
        """Whether it still holds for the next process: memory may be free by then."""
        return self.failed != "memory"

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Verdict":
        """The verdict in a file; raises ValueError, KeyError or TypeError if it is none."""
        kinds = {"failed": str, "detail": str, "error": (float, int, type(None)), "speed": (float, int, type(None))}
        if set(saved) != set(kinds) or any(not isinstance(saved[name], kind) for name, kind in kinds.items()):  # type: ignore[arg-type]
            raise ValueError(f"the verdict is {saved}")
        return cls(**saved)

    def __str__(self) -> str:
        if self.failed:
            return f"{self.failed}: {self.detail}"
        return f"error {self.error:.0e}, {self.speed:.1f} times the form in PyTorch"


class VerdictFolder:
    """The files of a folder, each with the verdict on one kind of calls.

    Files are written under another name and renamed, so that several processes may read and write at once. One that
    cannot be read is as good as none: it is said so, and the next check writes it anew.
    """

    def __init__(self, path: Path | None = None) -> None:
        """`path`: the folder, by default `hf_rfa` in Triton's own cache (`TRITON_CACHE_DIR`)."""
        self._path = path

    @property
    def path(self) -> Path:
        """The folder, which need not be there."""
        return triton_cache() / "hf_rfa" if self._path is None else self._path

    def file(self, kind: Kind) -> Path:
        """Where the verdict on that kind is kept."""
        return self.path / f"{kind.digest}.json"

    def read(self, kind: Kind) -> Verdict | None:
        """The verdict on that kind; None if there is none, with a warning if there was one that cannot be read."""
        file = self.file(kind)
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved["kind"] != kind.to_dict():
                raise ValueError("it is about another kind of calls")
            return Verdict.from_dict(saved["verdict"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"{str(file)!r}, which holds the result of a check of the Triton kernels, cannot be read "
                f"({type(error).__name__}: {error}). The kernels are checked again and the file is written anew.",
                stacklevel=2,
            )
            return None

    def write(self, kind: Kind, verdict: Verdict) -> None:
        """Keep a verdict; warns if the folder cannot be written, which costs a check in every process."""
        text = json.dumps({"kind": kind.to_dict(), "verdict": dataclasses.asdict(verdict)}, indent=2) + "\n"
        file = self.file(kind)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.path, prefix=file.stem, suffix=".partial")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    stream.write(text)
                os.replace(partial, file)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
        except OSError as error:
            warnings.warn(
                f"The result of a check of the Triton kernels cannot be kept in {str(self.path)!r} ({error}), so that "
                "every process checks them again. Make the folder writable, or set TRITON_CACHE_DIR to one that is.",
                stacklevel=2,
            )


def triton_cache() -> Path:
    """Triton's folder of compiled kernels."""
    from triton import knobs  # not every machine has Triton

    return Path(knobs.cache.dir)
