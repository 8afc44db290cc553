"""Within `plain_loading`, Transformers and PEFT load what their files say, without hf_rfa's help."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain_loading() -> Iterator[None]:
    """Load the model under a conversion, or the LoRA beside one: hf_rfa itself puts them together."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def loads_plainly() -> bool:
    """Whether hf_rfa's own loading is what calls."""
    return _plain.get()
