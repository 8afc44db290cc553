"""The linear heads as one operation of a graph, for `torch.compile(fullgraph=True)` and `torch.export`.

The operator branches on values that a tracer cannot see: where the padding is, how far each row's chunk is filled.
`torch.ops.hf_rfa.linear_heads` hides this from the tracer: it is one operation, the same for every length and every
decoding step, and changes none of its inputs. Its backward pass runs the forward pass again, with gradients.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.linear import linear_heads
from hf_rfa.ops.private import works
from hf_rfa.ops.state import RFAState, accumulation_dtype

_Run = Callable[..., list[torch.Tensor]]
_KERNEL = tuple(f.name for f in dataclasses.fields(FarKernel) if f.name != "feature_maps")
#: Numeric fields of `OperatorCall`, which the operation takes as one list.
_NUMBERS = ("causal", "window", "sink_tokens", "kept_keys")
_STATE = (
    "kv_state", "log_max", "near_key", "near_value", "sink_key", "sink_value", "count", "kept_key", "kept_value",
    "kept_position", "kept_decay", "mass",
)  # fmt: skip


def linear_heads_of_graph(call: OperatorCall) -> tuple[torch.Tensor, RFAState | None]:
    """`linear_heads` as an operation that is opaque to tracers."""
    named: dict[str, torch.Tensor | None] = {"query": call.query, "key": call.key, "value": call.value}
    named |= {name: getattr(call.far, name) for name in _KERNEL}
    named |= {
        "sink_logits": call.sink_logits,
        "token_mask": call.layout.token_mask,
        "segment_ids": call.layout.segment_ids,
    }
    if call.state is not None:
        named |= {name: getattr(call.state, name) for name in _STATE}
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    output, counts, *state = torch.ops.hf_rfa.linear_heads(
        list(given.values()), ",".join(given), ",".join(call.far.feature_maps), [getattr(call, n) for n in _NUMBERS],
        call.scaling, call.backend, call.output_final_state, call.statistics is not None,
    )  # fmt: skip
    if call.statistics is not None:
        call.statistics.add_counts(counts)
    return output, RFAState(**dict(zip(_STATE, state, strict=False))) if call.output_final_state else None


@torch.library.custom_op("hf_rfa::linear_heads", mutates_args=())
def _operation(
    tensors: Sequence[torch.Tensor], names: str, feature_maps: str, numbers: Sequence[int], scaling: float,
    backend: str, output_final_state: bool, count: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """[output, (dropped, queries), *state]; `names` names the input tensors."""
    call = _call(tensors, names, feature_maps, numbers, scaling, backend)
    statistics = FarStatistics() if count else None
    call = call.replace(
        layout=_known_layout(call.layout), output_final_state=output_final_state, statistics=statistics
    )
    output, state = linear_heads(call)
    counts = torch.zeros(2, dtype=torch.int64) if statistics is None else statistics.counts()
    # Operations must return new tensors, as their fakes promise.
    output = output.to(accumulation_dtype(call.query.dtype))
    return [output.contiguous(), counts.to(output.device), *(t.clone() for t in _state_tensors(state))]


@_operation.register_fake
def _(
    tensors: Sequence[torch.Tensor], names: str, feature_maps: str, numbers: Sequence[int], scaling: float,
    backend: str, output_final_state: bool, count: bool,
) -> list[torch.Tensor]:  # fmt: skip
    call = _call(tensors, names, feature_maps, numbers, scaling, backend)
    wide = accumulation_dtype(call.query.dtype)
    output = call.query.new_empty(*call.query.shape[:-1], call.value.shape[-1], dtype=wide)
    counts = call.query.new_empty(2, dtype=torch.int64)
    state = call.empty_state() if output_final_state else None
    return [output, counts, *(torch.empty_like(t) for t in _state_tensors(state))]


def _call(
    tensors: Sequence[torch.Tensor], names: str, feature_maps: str, numbers: Sequence[int], scaling: float,
    backend: str,
) -> OperatorCall:  # fmt: skip
    given = dict(zip(names.split(","), tensors, strict=True))
    far = FarKernel(tuple(feature_maps.split(",")), **{name: given.get(name) for name in _KERNEL})  # type: ignore[arg-type]
    held: dict[str, Any] = {name: given[name] for name in _STATE if name in given}
    state = RFAState(**held) if "count" in given else None
    causal, window, sink_tokens, kept_keys = numbers
    return OperatorCall(
        given["query"], given["key"], given["value"], far, scaling=scaling,
        causal=bool(causal), window=window, sink_tokens=sink_tokens,
        layout=TokenLayout(given.get("token_mask"), given.get("segment_ids")), softmax_heads=(), sliding_window=None,
        sink_logits=given.get("sink_logits"), state=state, backend=backend,
        kept_of_heads=(kept_keys,) * given["key"].shape[1],
    )  # fmt: skip


def _known_layout(layout: TokenLayout) -> TokenLayout:
    """The layout in its simplest form, one object for all layers; reads the tensors."""
    token_mask, segment_ids = (None if t is None else t.cpu() for t in (layout.token_mask, layout.segment_ids))
    if token_mask is not None and bool(token_mask.all()):
        token_mask = None
    if segment_ids is not None and bool((segment_ids == segment_ids[:, :1]).all()):
        segment_ids = None
    return _shared_layout(
        *(None if t is None else (t.dtype, t.shape, t.numpy().tobytes()) for t in (token_mask, segment_ids))
    )


@functools.lru_cache(maxsize=4)
def _shared_layout(*contents: tuple[torch.dtype, torch.Size, bytes] | None) -> TokenLayout:
    def tensor(dtype: torch.dtype, shape: torch.Size, content: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)

    token_mask, segment_ids = (None if content is None else tensor(*content) for content in contents)
    return TokenLayout(token_mask, segment_ids)


def _by_autograd(run: _Run, sources: list[torch.Tensor], gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    with _recording():
        leaves = [t.detach().requires_grad_() for t in sources]
        pairs = [(t, g) for t, g in zip(run(*leaves), gradients, strict=True) if t.requires_grad]
        return torch.autograd.grad(
            [t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
        )


def _by_transform(run: _Run, sources: list[torch.Tensor], gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    pull_back = torch.func.vjp(run, *sources)[1]
    return pull_back(list(gradients))


@functools.cache
def recording_works() -> bool:
    """Whether `_recording`, which uses private calls, works; to be called inside an operation."""
    return works("the switches of autograd inside of an operation", _recording_is_right)


def _recording_is_right() -> bool:
    root = torch.full((), 3.0, device="cpu")
    return [g.item() for g in _by_autograd(lambda x: [x * x], [root], [torch.ones_like(root)])] == [6.0]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Switch autograd on inside an operation, where torch has switched it off."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - keys), torch.enable_grad():
        yield


def _state_tensors(state: RFAState | None) -> list[torch.Tensor]:
    # The tensors of kept keys come last; all or none of them are there.
    return [] if state is None else [getattr(state, name) for name in _STATE if getattr(state, name) is not None]


@torch.library.custom_op("hf_rfa::linear_heads_backward", mutates_args=())
def _backward_operation(
    gradients: Sequence[torch.Tensor], wanted: Sequence[bool], given: Sequence[bool],
    tensors: Sequence[torch.Tensor], names: str, feature_maps: str, numbers: Sequence[int], scaling: float,
    backend: str, output_final_state: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of the wanted tensors, given those of the outputs (the output and the state's tensors)."""
    sources = [t for t, want in zip(tensors, wanted, strict=True) if want]

    def run(*chosen: torch.Tensor) -> list[torch.Tensor]:
        leaves = iter(chosen)
        whole = [next(leaves) if want else t for t, want in zip(tensors, wanted, strict=True)]
        call = _call(whole, names, feature_maps, numbers, scaling, backend)
        output, state = linear_heads(call.replace(layout=layout, output_final_state=output_final_state))
        results = [output, *_state_tensors(state)]
        return [t for t, present in zip(results, given, strict=True) if present]

    layout = _known_layout(_call(tensors, names, feature_maps, numbers, scaling, backend).layout)
    # Autograd is a few per cent faster than `torch.func`, which is the public way inside an operation.
    found = (_by_autograd if recording_works() else _by_transform)(run, sources, gradients)
    return [gradient.clone(memory_format=torch.contiguous_format) for gradient in found]


@_backward_operation.register_fake
def _(
    gradients: Sequence[torch.Tensor], wanted: Sequence[bool], given: Sequence[bool],
    tensors: Sequence[torch.Tensor], names: str, feature_maps: str, numbers: Sequence[int], scaling: float,
    backend: str, output_final_state: bool,
) -> list[torch.Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t, want in zip(tensors, wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    tensors, *settings, _ = inputs  # `count` has no influence on the gradients
    ctx.save_for_backward(*tensors)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: list[torch.Tensor | None]) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    wanted = [t.is_floating_point() and need for t, need in zip(tensors, ctx.needs_input_grad[0], strict=True)]
    gradients = [gradients[0], *gradients[2:]]  # counts have no gradient
    found = iter(
        torch.ops.hf_rfa.linear_heads_backward(
            [g for g in gradients if g is not None], wanted, [g is not None for g in gradients], tensors, *ctx.settings
        )
    )
    return [next(found) if want else None for want in wanted], *(None,) * 7


_operation.register_autograd(_backward, setup_context=_setup_context)
