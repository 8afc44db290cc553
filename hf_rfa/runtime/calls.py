"""Records of one call of a converted model, and how the attention function finds them.

Transformers passes its attention functions neither the cache nor anything else that a converted layer must know of the
call around it. None of it is kept in the modules, because two threads may run one model.

| record        | of                                  | found by the attention function                         |
|---------------|-------------------------------------|---------------------------------------------------------|
| `ForwardCall` | one forward of the whole model      | on the mask, else in the context                        |
| `LayerCall`   | one forward of an attention module  | in the context                                          |

*The context* is a context variable; every thread has its own. Activation checkpointing runs layers again in
the backward pass, on a GPU in a thread of autograd's own: so the `ForwardCall` travels with the mask, which is an
argument of the layers. A tracer cannot read context variables; while it traces, a `LayerCall` waits in its adapter.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from hf_rfa.errors import UnsupportedModelError

if TYPE_CHECKING:
    from hf_rfa.runtime.adapter import RFAAdapter
    from hf_rfa.runtime.cache import RFACacheLayer


class Recorder(Protocol):
    """Is shown every call of the attention function in a dry run of `convert`."""

    #: Whether every head answers exactly, as before the conversion.
    exact: bool

    def call(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, extras: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """Note one call, which is computed inside the returned context."""


@dataclass(frozen=True)
class Interception:
    """Replacements for the random features of layers, in force for a `with` block.

    Attributes:
        recorder: Is shown every call, see `Recorder`.
        observers: By adapter: called with q, k, v and the output of the layer, which is exact softmax meanwhile.
        shards: By adapter: computes a layer whose tokens are split over processes.
    """

    recorder: Recorder | None = None
    observers: Mapping["RFAAdapter", Callable[..., None]] = field(default_factory=dict)
    shards: Mapping["RFAAdapter", Callable[..., torch.Tensor]] = field(default_factory=dict)


_NOTHING = Interception()
_interception: ContextVar[Interception] = ContextVar("interception", default=_NOTHING)
#: Number of open `intercept` blocks in all threads, for tracers, which cannot read the context.
_open_blocks = [0]


@contextmanager
def intercept(interception: Interception) -> Iterator[None]:
    """Within the block, `interception` holds for the converted layers that this thread calls."""
    token = _interception.set(interception)
    _open_blocks[0] += 1
    try:
        yield
    finally:
        _open_blocks[0] -= 1
        _interception.reset(token)


def current_interception() -> Interception:
    """The interception of this thread. A tracer has none: it may not start inside a block (`refuse_in_graph`)."""
    return _NOTHING if torch.compiler.is_compiling() else _interception.get()


def refuse_in_graph() -> None:
    """Raise if a graph is traced while something intercepts calls: the graph would leave that out."""
    if _open_blocks[0]:
        raise UnsupportedModelError(
            "A compiled model cannot be calibrated, distilled, converted or run with sequence parallelism: its graph "
            "does not see what these put into its layers. Pass the model as it was before `torch.compile`."
        )


@dataclass(frozen=True)
class ForwardCall:
    """One forward of a whole model.

    Attributes:
        record: id of the conversion of the model that was called, so that a model inside another begins its own.
        draw: The draw of omega that all layers use, also when they run again in the backward pass; None for the
            adapters' current one.
        interception: The one in force when the forward began.
    """

    record: int
    draw: int | None
    interception: Interception

    @property
    def travels(self) -> bool:
        """Whether a layer that runs again in the backward pass needs it."""
        return self.draw is not None or self.interception is not _NOTHING


_forward_call: ContextVar[ForwardCall | None] = ContextVar("forward_call", default=None)
_layer_call: "ContextVar[LayerCall | None]" = ContextVar("layer_call", default=None)


@contextmanager
def forward_call(call: ForwardCall) -> Iterator[None]:
    """Within the block, the model's layers belong to `call`; their own calls end with it, also after an error."""
    token, layer = _forward_call.set(call), _layer_call.set(None)
    try:
        yield
    finally:
        _layer_call.reset(layer)
        _forward_call.reset(token)


def current_forward() -> ForwardCall | None:
    """The forward that this thread is in; None outside of any, and while tracing."""
    return None if torch.compiler.is_compiling() else _forward_call.get()


def travelling_call() -> ForwardCall | None:
    """`current_forward` if layers that run again in the backward pass need it, else None."""
    call = current_forward()
    return call if call is not None and call.travels else None


#: The number of the backward pass that this thread is in, -1 outside of any. Torch has nothing public for it; where
#: this is missing, a forward that runs again without its `ForwardCall` goes unnoticed.
_backward_pass = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def in_backward_pass() -> bool:
    """Whether this is a backward pass, in which activation checkpointing runs layers again."""
    return bool(_backward_pass() != -1)


class LayerCall:
    """One forward of a converted attention module, begun by its pre-hook.

    Attributes:
        turns: How often the module has attended in it.
    """

    def __init__(self, adapter: "RFAAdapter", cache_layer: "RFACacheLayer | None") -> None:
        self.turns = 0
        self._adapter = weakref.ref(adapter)
        # The cache belongs to the caller, who holds it for as long as the call lasts; the context lasts longer.
        self._cache_layer = None if cache_layer is None else weakref.ref(cache_layer)

    def belongs_to(self, adapter: "RFAAdapter") -> bool:
        """Whether it is a call of this adapter's module."""
        return self._adapter() is adapter

    @property
    def cache_layer(self) -> "RFACacheLayer | None":
        """The cache layer that the module was called with; None if there is none, or if it no longer exists."""
        return None if self._cache_layer is None else self._cache_layer()


class TracedLayerCall:
    """A `LayerCall` under a tracer, which cannot follow weak references."""

    def __init__(self, cache_layer: "RFACacheLayer | None") -> None:
        self.turns = 0
        self.cache_layer = cache_layer


def begin_layer(adapter: "RFAAdapter", cache_layer: "RFACacheLayer | None") -> None:
    """Note that a forward of the adapter's module begins."""
    if torch.compiler.is_compiling():
        adapter.traced_call = TracedLayerCall(cache_layer)
        return
    _layer_call.set(LayerCall(adapter, cache_layer))
    if adapter.traced_call is not None:  # left behind by a traced call that ended in an error
        adapter.traced_call = None


def layer_call(adapter: "RFAAdapter") -> LayerCall | TracedLayerCall:
    """The current forward of the adapter's module; one without a cache if none was begun.

    Raises:
        UnsupportedModelError: It was begun outside of the tracer that now asks for it and cannot read the context.
    """
    traced = adapter.traced_call
    if traced is not None:  # also where the graph breaks between the module's pre-hook and its attention
        adapter.traced_call = None
        return cast(TracedLayerCall, traced)
    if torch.compiler.is_compiling():
        raise UnsupportedModelError(
            "A converted attention module was compiled without its pre-hooks, which tell it of the cache. Compile the "
            "module (`module.compile()`), its layer or the model, not `module.forward`."
        )
    call = _layer_call.get()
    return call if call is not None and call.belongs_to(adapter) else LayerCall(adapter, None)


def is_called_with(cache_layer: "RFACacheLayer") -> bool:
    """Whether the module that this thread runs was called with this cache layer; tracers cannot ask and get True."""
    if torch.compiler.is_compiling():
        return True
    call = _layer_call.get()
    return call is not None and call.cache_layer is cache_layer
