"""What belongs to one call of a converted model, and how the attention function finds it.

Transformers hands its attention functions neither the cache nor anything else that a converted layer needs of the call
that it is part of. None of it is kept in the modules: two threads may run one model, and each has its own calls.

| record        | of                                  | found by the attention function                         |
|---------------|-------------------------------------|---------------------------------------------------------|
| `ForwardCall` | one forward of the whole model      | on the mask, else in the context                        |
| `LayerCall`   | one forward of an attention module  | in the context                                          |

*The context* is a context variable, which every thread has of its own. Activation checkpointing runs layers again in
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
    """Sees every call of the attention function while `convert` watches a model."""

    #: Whether every head answers exactly, as before the conversion.
    exact: bool

    def call(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, extras: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """Note one call, which is computed inside the returned context."""


@dataclass(frozen=True)
class Interception:
    """What answers in place of the random features of a layer, for as long as a `with` block lasts.

    Attributes:
        recorder: Sees every call, see `Recorder`.
        observers: By adapter: what sees q, k, v and the output of a layer, which answers with exact softmax.
        shards: By adapter: what computes a layer whose tokens are split over processes.
    """

    recorder: Recorder | None = None
    observers: Mapping["RFAAdapter", Callable[..., None]] = field(default_factory=dict)
    shards: Mapping["RFAAdapter", Callable[..., torch.Tensor]] = field(default_factory=dict)


_NOTHING = Interception()
_interception: ContextVar[Interception] = ContextVar("interception", default=_NOTHING)
#: Blocks of `intercept` that are open in any thread: what a tracer, which cannot read the context, asks for.
_open_blocks = [0]


@contextmanager
def intercept(interception: Interception) -> Iterator[None]:
    """Within the block this thread's calls of converted layers are answered as `interception` says."""
    token = _interception.set(interception)
    _open_blocks[0] += 1
    try:
        yield
    finally:
        _open_blocks[0] -= 1
        _interception.reset(token)


def current_interception() -> Interception:
    """That of this thread; none for a tracer, which refuses to begin inside a block (`refuse_in_graph`)."""
    return _NOTHING if torch.compiler.is_compiling() else _interception.get()


def refuse_in_graph() -> None:
    """Raise where a graph would be made of a call that something intercepts: it would leave that out."""
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
        draw: The draw of omega that all layers use, also when they run again in the backward pass; None where it is
            whatever draw the adapters have.
        interception: What answers in place of the random features.
    """

    record: int
    draw: int | None
    interception: Interception

    @property
    def travels(self) -> bool:
        """Whether a layer that runs again in the backward pass must be told of it."""
        return self.draw is not None or self.interception is not _NOTHING


_forward_call: ContextVar[ForwardCall | None] = ContextVar("forward_call", default=None)
_layer_call: "ContextVar[LayerCall | None]" = ContextVar("layer_call", default=None)


@contextmanager
def forward_call(call: ForwardCall) -> Iterator[None]:
    """Within the block the model's layers belong to `call`, and with it the calls of layers end, also by an error."""
    token, layer = _forward_call.set(call), _layer_call.set(None)
    try:
        yield
    finally:
        _layer_call.reset(layer)
        _forward_call.reset(token)


def current_forward() -> ForwardCall | None:
    """The forward that this thread is in; None outside of one, and while tracing."""
    return None if torch.compiler.is_compiling() else _forward_call.get()


def travelling_call() -> ForwardCall | None:
    """`current_forward`, where layers that run again in the backward pass must be told of it."""
    call = current_forward()
    return call if call is not None and call.travels else None


#: The number of the backward pass that this thread is in, -1 outside of one. Private, as all that torch has for it:
#: where it is missing, a forward that runs again without its `ForwardCall` is not noticed.
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
        """What the module was called with."""
        return None if self._cache_layer is None else self._cache_layer()


class TracedLayerCall:
    """The same while a tracer looks on, which cannot follow weak references."""

    def __init__(self, cache_layer: "RFACacheLayer | None") -> None:
        self.turns = 0
        self.cache_layer = cache_layer


def begin_layer(adapter: "RFAAdapter", cache_layer: "RFACacheLayer | None") -> None:
    """A forward of the adapter's module begins."""
    if torch.compiler.is_compiling():
        adapter.traced_call = TracedLayerCall(cache_layer)
        return
    _layer_call.set(LayerCall(adapter, cache_layer))
    if adapter.traced_call is not None:  # of a traced call that an error ended
        adapter.traced_call = None


def layer_call(adapter: "RFAAdapter") -> LayerCall | TracedLayerCall:
    """The forward of its module that the adapter is asked to attend in; one without a cache if none was begun.

    Raises:
        UnsupportedModelError: It was begun where no tracer looked on, and now one does, which cannot read of it.
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
    """Whether the forward of a converted module that this thread is in got this cache; a tracer has to believe it."""
    if torch.compiler.is_compiling():
        return True
    call = _layer_call.get()
    return call is not None and call.cache_layer is cache_layer
