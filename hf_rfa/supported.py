"""Which model classes convert: the recorded matrix of architectures, and a search in it.

`tests/conversion/test_matrix.py` builds a tiny model of every class, converts it and tests what a converted model must
be able to do; `supported.json` holds the outcomes.
"""

import json
from dataclasses import dataclass
from importlib import resources

from hf_rfa.errors import ConfigError

#: File of the matrix, within the package.
MATRIX_FILE = "supported.json"
#: Outcomes: a class converts, `convert` refuses it, or no tiny model of it could be built.
CONVERTS, REFUSED, NOT_TRIED = "converts", "refused", "not tried"
OUTCOMES = (CONVERTS, REFUSED, NOT_TRIED)


@dataclass(frozen=True)
class Architecture:
    """One model class with one of its config types.

    Attributes:
        table: The table of Transformers' auto classes that names it, or "encoder".
        outcome: One of `OUTCOMES`.
        reason: The message of `convert`, or why no tiny model could be built; empty for classes that convert.
        stages: Result of each stage that is not "ok", by name (see `tests/matrix_checks.py`).
    """

    model_type: str
    model_class: str
    table: str
    outcome: str
    reason: str
    stages: dict[str, str]


@dataclass(frozen=True)
class Matrix:
    """The recorded matrix: its rows, and the version of Transformers that it was made with."""

    transformers: str
    architectures: tuple[Architecture, ...]

    def count(self, outcome: str) -> int:
        """Number of rows with this outcome."""
        return sum(row.outcome == outcome for row in self.architectures)


def read_matrix(text: str | None = None) -> Matrix:
    """The matrix in a JSON text; by default the one of the package.

    Example:
        >>> import hf_rfa.supported
        >>> matrix = hf_rfa.supported.read_matrix()
        >>> [row.outcome for row in matrix.architectures if row.model_type == "llama"]
        ['converts']
    """
    if text is None:
        text = resources.files("hf_rfa").joinpath(MATRIX_FILE).read_text(encoding="utf-8")
    content = json.loads(text)
    return Matrix(content["transformers"], tuple(Architecture(**row) for row in content["architectures"]))


def write_matrix(matrix: Matrix) -> str:
    """The matrix as JSON, one row per line, so that a change of one class changes one line."""
    rows = ",\n".join(json.dumps(vars(row), ensure_ascii=False) for row in matrix.architectures)
    return f'{{"transformers": {json.dumps(matrix.transformers)}, "architectures": [\n{rows}\n]}}\n'


def find(matrix: Matrix, name: str = "", outcome: str | None = None) -> list[Architecture]:
    """The rows whose class or model type contains `name`, in any case, with one outcome or with any.

    Raises:
        ConfigError: `outcome` is none of `OUTCOMES`.
    """
    if outcome is not None and outcome not in OUTCOMES:
        raise ConfigError(f"`outcome` must be one of {', '.join(OUTCOMES)}. Got {outcome!r}. Correct it.")
    wanted = name.casefold()
    return [
        row
        for row in matrix.architectures
        if (wanted in row.model_class.casefold() or wanted in row.model_type.casefold())
        and outcome in (None, row.outcome)
    ]
