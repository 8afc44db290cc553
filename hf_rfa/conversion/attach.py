"""`swap_attention` and `revert`: swap the attention of a loaded model, verify it, and give the original back."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_rfa.config import RFAConfig
from hf_rfa.conversion.converted_class import enter, leave
from hf_rfa.conversion.example_inputs import describe, guess_inputs, refuse_meta
from hf_rfa.conversion.implementation import (
    IMPLEMENTATION,
    OwnConfigs,
    implementations,
    keep_unreached,
    restore,
    switch,
)
from hf_rfa.conversion.packing import keeps_documents_apart
from hf_rfa.conversion.probe import AttentionCalls, DryRun, count_calls, watch
from hf_rfa.errors import ConfigError, RFAError, UnsupportedModelError
from hf_rfa.runtime.adapter import ADAPTER_NAME, RFAAdapter
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.devices import execution_device
from hf_rfa.runtime.layer_cache import stash_cache
from hf_rfa.runtime.mask import RFAMask
from hf_rfa.runtime.quiet import plain_torch
from hf_rfa.runtime.record import CONFIG_FIELD, RECORD, Conversion, base_model, is_converted, store_config
from hf_rfa.runtime.refusals import refuse_attention_weights
from hf_rfa.runtime.softmax_heads import apply_softmax_heads

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


@plain_torch()
def swap_attention(
    model: ModelT,
    config: RFAConfig,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    submodels: Sequence[str] | None = None,
) -> ModelT:
    """`hf_rfa.convert` without calibration: attach the adapters, switch the implementation and verify, or undo it all.

    Raises:
        UnsupportedModelError, ConfigError: see `hf_rfa.convert`.
    """
    if not isinstance(config, RFAConfig):
        raise ConfigError(
            f"`config` must be an RFAConfig or None. Got {type(config).__name__}. Pass hf_rfa.RFAConfig(...)."
        )
    config, base = config.settled(), base_model(model)
    if is_converted(base):
        raise UnsupportedModelError(
            "The model is converted already. Call `hf_rfa.revert(model)` first, or resume with it as it is."
        )
    scope: dict[str, Any] = (
        {} if submodels is None else {"parts": list(submodels)}
    )  # the name that it has in saved files
    if example_inputs is not None:
        scope["example_inputs"] = describe(example_inputs)
    refuse_meta(base)
    _refuse_sparse(base)
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            refuse_attention_weights(module, {})
    configs = OwnConfigs(model, base)
    before = implementations(base)
    try:
        switch(base, before, submodels)
        run, inputs = _watch(base, [dict(example_inputs)] if example_inputs is not None else guess_inputs(base))
        _refuse_unrouted(base, run)
        left = keep_unreached(base, before, [call.module for call in run.calls.values()])
        _attach(base, config, list(run.calls.values()))
        originals = [(c, "sdpa" if i == IMPLEMENTATION else i) for c, i in before]
        setattr(base, RECORD, Conversion(config, originals, scope))
        _verify(base, run, inputs)
        packs = keeps_documents_apart(base, inputs)
    except BaseException:
        _detach(base)
        restore(before)
        configs.undo()
        raise
    getattr(base, RECORD).packs = packs
    if left:
        logger.warning(
            "The dry run did not reach %s: left with the attention that it had. To convert it, pass `example_inputs` "
            "that reach it.",
            ", ".join(left),
        )
    store_config(base, config)
    enter(base, {id(module) for _, module, _ in named_adapters(base)})
    _warn_about_dropout(base)
    return model


def revert(model: ModelT) -> ModelT:
    """Give the original attention back, in place: outputs are bit-identical to those before `convert`.

    Example:
        >>> import torch, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model, ids = LlamaForCausalLM(LlamaConfig(**size)).eval(), torch.ones(1, 300, dtype=torch.long)
        >>> before = model(ids).logits
        >>> torch.equal(hf_rfa.revert(hf_rfa.convert(model, calibrate=False))(ids).logits, before)
        True
    """
    base = base_model(model)
    conversion = getattr(base, RECORD, None)
    if conversion is None:
        raise UnsupportedModelError(f"This {type(base).__name__} is not converted, so there is nothing to revert.")
    _detach(base)
    restore(conversion.implementations)
    return model


def _watch(model: PreTrainedModel, candidates: Iterable[dict[str, Any]]) -> tuple[DryRun, dict[str, Any]]:
    """The dry run on the first inputs that the model accepts."""
    first: Exception | None = None
    for inputs in candidates:
        try:
            return watch(model, inputs), inputs
        except RFAError:
            raise
        except Exception as error:
            first = first or error
    if RFAMask.__name__ in str(first):  # Python's own message about a mask object that is no tensor
        raise UnsupportedModelError(
            f"{type(model).__name__} works on its attention masks itself (attention of its own, masks that it joins, "
            f"or 4-D masks of numbers; Python says: {first}), which random features cannot follow. Keep softmax "
            "attention for this model."
        ) from first
    raise UnsupportedModelError(
        f"The dry run of {type(model).__name__} failed with {type(first).__name__}: {first}. If its inputs were "
        "wrong, pass `example_inputs={...}`; otherwise the model computes attention of its own, which is not "
        "supported."
    ) from first


def _refuse_sparse(model: PreTrainedModel) -> None:
    """Refuse layers that choose tokens by an indexer: they work on the mask before they attend."""
    found = next(
        (type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Indexer")), None
    )
    if found is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} attends to few tokens that an indexer chooses ({found}): sparse attention, which "
            "random features cannot express. Keep softmax attention for this model."
        )


def _refuse_unrouted(model: PreTrainedModel, run: DryRun) -> None:
    name = type(model).__name__
    if not run.calls:
        raise UnsupportedModelError(
            f"{name} computes attention of its own (none of it went through Transformers' attention interface), so "
            "it cannot be converted. `hf-rfa supported` lists the models that can be."
        )
    if run.foreign_attention():
        raise UnsupportedModelError(
            f"{name} computes some of its attention outside of Transformers' attention interface, so that a "
            "conversion would leave softmax in it unseen. It cannot be converted."
        )


def _attach(model: PreTrainedModel, config: RFAConfig, calls: list[AttentionCalls]) -> None:
    own = [call for call in calls if not call.cross]
    numbers = {id(call.module): number for number, call in enumerate(own)}
    if isinstance(config.layers, tuple) and max(config.layers) >= len(own):
        raise ConfigError(
            f"`layers` must name attention layers 0..{len(own) - 1} of this model. Got {list(config.layers)}. "
            "Correct RFAConfig(layers=...)."
        )
    for call in calls:
        number = numbers.get(id(call.module), -1)
        local = call.sliding_window is not None or call.masked
        chosen = not call.cross and not local and config.converts_layer(number)
        # Cross-attention is not numbered; its adapter only marks it.
        adapter = RFAAdapter(
            config, max(number, 0), call.key_heads, call.head_dim, converted=chosen, cross=call.cross,
            masked=call.masked,
        )  # fmt: skip
        call.module.add_module(ADAPTER_NAME, adapter.to(execution_device(call.module)))
        call.module.register_forward_pre_hook(stash_cache, with_kwargs=True)
    if not any(adapter.converted for _, _, adapter in named_adapters(model)):
        raise UnsupportedModelError(
            f"No layer of {type(model).__name__} was left to convert: all have a sliding window or a mask of "
            "their own (their cost is linear already), are cross-attention or are excluded by `layers`."
        )
    apply_softmax_heads(model, config)


def _verify(model: PreTrainedModel, run: DryRun, inputs: Mapping[str, Any]) -> None:
    """Run the converted model: every adapter must be called as often as its module was."""
    adapters = {id(module): (name, adapter) for name, module, adapter in named_adapters(model)}
    counted = count_calls(model, inputs)
    for key, call in run.calls.items():
        name, adapter = adapters[key]
        calls = counted.total.get(key, 0)
        if calls != call.count:
            raise UnsupportedModelError(
                f"The converted {name} ran its random features {calls} times instead of {call.count}: the "
                "model does not use its attention modules as expected."
            )
        turns = counted.in_a_forward[key]
        if turns > 2:
            raise UnsupportedModelError(
                f"{name} attends {turns} times in one forward, which is not supported beyond two. "
                "Keep softmax for this model."
            )
        adapter.attends_twice = turns == 2


def _detach(model: PreTrainedModel) -> None:
    """Remove everything that `convert` added."""
    for _, module, _ in list(named_adapters(model)):
        del module._modules[ADAPTER_NAME]
        _remove_hook(module, stash_cache)
    leave(model)
    model.__dict__.pop(RECORD, None)
    if hasattr(model.config, CONFIG_FIELD):
        delattr(model.config, CONFIG_FIELD)


def _remove_hook(module: nn.Module, hook: Any) -> None:
    # Handles are not kept: a model with a list of them would not survive a deepcopy with its hooks.
    for key in [key for key, value in module._forward_pre_hooks.items() if value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _warn_about_dropout(model: PreTrainedModel) -> None:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    rates = {name: getattr(model.config, name) for name in names if getattr(model.config, name, 0)}
    if rates:
        logger.warning(
            "Random features never make the attention weights, so the attention dropout of this model (%s) is not "
            "applied in training. Set it to 0 in the config to silence this.",
            rates,
        )
