"""A vector index (FAISS) that keeps the embeddings of an encoder, in float32 or 8 bits, with what they are of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_rfa.errors import CheckpointError, ConfigError

INDEX_FILE, NAMES_FILE = "index.faiss", "names.json"
Precision = Literal["float32", "int8"]


class EmbeddingIndex:
    """Exact search by cosine over unit vectors.

    With `precision="int8"` a vector takes d bytes instead of 4 d (FaceNet: 128 bytes lose nothing), each
    dimension in 256 steps of its own range; queries stay in float32.

    Args:
        embeddings: (texts, d), brought to unit length.
        names: One for each text.

    Raises:
        ConfigError: Names and embeddings do not fit each other, or there are none.

    Example:
        >>> import numpy as np, pytest
        >>> _ = pytest.importorskip("faiss")
        >>> from hf_rfa.embeddings import EmbeddingIndex
        >>> index = EmbeddingIndex(np.eye(4), ["a", "b", "c", "d"])
        >>> index.search(np.array([[0.1, 0.9, 0.2, 0.0]]), 2)[0]
        [('b', 0.97...), ('c', 0.21...)]
    """

    def __init__(self, embeddings: np.ndarray, names: Sequence[str], *, precision: Precision = "float32") -> None:
        faiss = _faiss()
        vectors = unit(embeddings)
        if len(vectors) != len(names) or not len(vectors):
            raise ConfigError(
                f"An index needs one name for each embedding. Got {len(names)} names and {len(vectors)} embeddings."
            )
        if precision not in ("float32", "int8"):
            raise ConfigError(f"`precision` must be 'float32' or 'int8'. Got {precision!r}.")
        dimension = vectors.shape[1]
        if precision == "int8":
            eight_bits, inner = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            self._index = faiss.IndexScalarQuantizer(dimension, eight_bits, inner)
            self._index.train(vectors)
        else:
            self._index = faiss.IndexFlatIP(dimension)
        self._index.add(vectors)
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def vectors(self) -> np.ndarray:
        """The stored embeddings (texts, d), float32; those of 8 bits as they are read back."""
        found: np.ndarray = self._index.reconstruct_n(0, len(self))
        return found

    @property
    def vector_bytes(self) -> int:
        """Bytes of one stored embedding."""
        return int(self._index.sa_code_size())

    def search(self, queries: np.ndarray, count: int) -> list[list[tuple[str, float]]]:
        """Names and cosines of the nearest `count` texts for each of the queries (n, d), the nearest first."""
        if count < 1:
            raise ConfigError(f"A search finds one text or more. Got count={count}.")
        if queries.ndim != 2 or queries.shape[1] != self._index.d:
            raise ConfigError(
                f"Queries must have the index's {self._index.d} dimensions. Got shape {tuple(queries.shape)}. Encode "
                "them with an encoder that was trained to search this index."
            )
        cosines, numbers = self._index.search(unit(queries), min(count, len(self)))
        return [
            [(self.names[number], float(cosine)) for number, cosine in zip(row, values, strict=True)]
            for row, values in zip(numbers.tolist(), cosines.tolist(), strict=True)
        ]

    def save(self, folder: str | Path) -> None:
        """Write `index.faiss` and `names.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        _faiss().write_index(self._index, str(Path(folder) / INDEX_FILE))
        (Path(folder) / NAMES_FILE).write_text(json.dumps(self.names), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "EmbeddingIndex":
        """Read what `save` wrote.

        Raises:
            CheckpointError: It is not there, or damaged.
        """
        index = cls.__new__(cls)
        try:
            index.names = json.loads((Path(folder) / NAMES_FILE).read_text(encoding="utf-8"))
            index._index = _faiss().read_index(str(Path(folder) / INDEX_FILE))
        except (OSError, ValueError, RuntimeError) as error:  # FAISS raises RuntimeError for any bad file
            raise CheckpointError(
                f"No index can be read from {str(folder)!r}: {error}. Save one there by `EmbeddingIndex.save`."
            ) from error
        if index._index.ntotal != len(index.names):
            raise CheckpointError(
                f"The index in {str(folder)!r} has {index._index.ntotal} embeddings and {len(index.names)} names: its "
                "files do not belong together. Save it again."
            )
        return index


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Rows (n, d) at unit length, float32 and contiguous; zeros stay zeros.

    Raises:
        ConfigError: They are no rows, or hold a NaN or an infinity, which no search or measure may take for a place.
    """
    rows = np.ascontiguousarray(embeddings, dtype=np.float32)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ConfigError(f"Embeddings must have the shape (texts, dimension). Got {rows.shape}.")
    strange = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(strange):
        raise ConfigError(
            f"Embeddings must be finite. Got a NaN or an infinity in {len(strange)} of {len(rows)}, the first of them "
            f"number {strange[0]}. Did the training diverge? Lower `learning_rate`."
        )
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    found: np.ndarray = rows / np.where(lengths == 0, 1, lengths)
    return found


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("A vector index needs FAISS: `pip install 'hf_rfa[embeddings]'`.") from error
    return faiss
