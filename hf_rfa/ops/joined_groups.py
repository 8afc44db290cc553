"""Heads that keep different numbers of keys as one call, for kernels that compute all of them side by side.

In such a call the state of every head has room for K keys, the most that one of them keeps; a head that keeps fewer
leaves the first places empty. Groups of heads, one for each number, are what the other forms run one after the other.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.state import RFAState

#: Fields of a state with a row for each key head.
_OF_HEADS = ("kv_state", "log_max", "near_key", "near_value", "sink_key", "sink_value")
_OF_KEPT_KEYS = ("kept_key", "kept_value", "kept_position", "kept_decay", "mass")

Groups = Sequence[tuple[list[int], OperatorCall]]


def join_groups(call: OperatorCall, groups: Groups) -> OperatorCall:
    """The linear heads of a call, in order, with the states of its `groups` as one."""
    heads = call.linear_heads
    whole = call if len(heads) == call.key.shape[1] else call.heads(heads)
    whole = whole.replace(softmax_heads=())
    if call.state is None:
        return whole
    most, states = whole.most_kept, [_with_room(group, whole.most_kept) for _, group in groups]
    grouped = [head for own, _ in groups for head in own]
    order = torch.tensor([grouped.index(head) for head in heads], device=call.key.device)
    names = _OF_HEADS + (_OF_KEPT_KEYS if most else ())
    fields: dict[str, Any] = {
        name: torch.cat([getattr(state, name) for state in states], 1).index_select(1, order) for name in names
    }
    return whole.replace(state=RFAState(**fields, count=states[0].count))


def split_state(state: RFAState, call: OperatorCall, groups: Groups) -> list[RFAState]:
    """The states of the groups after a call of `join_groups`."""
    heads, found = call.linear_heads, []
    for own, group in groups:
        rows = torch.tensor([heads.index(head) for head in own], device=state.kv_state.device)
        fields: dict[str, Any] = {name: getattr(state, name).index_select(1, rows) for name in _OF_HEADS}
        if group.kept_keys:
            fields |= {name: getattr(state, name).index_select(1, rows) for name in _OF_KEPT_KEYS}
            empty = fields["kept_key"].shape[2] - group.kept_keys
            fields |= {
                name: _places(_places(fields[name], name)[..., empty:], name).contiguous() for name in _OF_KEPT_KEYS
            }
        found.append(RFAState(**fields, count=state.count))
    return found


def _with_room(group: OperatorCall, most: int) -> RFAState:
    """The state of a group with empty places for `most` kept keys, in front."""
    group = group.replace(state=group.state or group.empty_state())
    state, empty = group.state, most - group.kept_keys
    assert state is not None
    if not empty:
        return state
    if not group.kept_keys:
        room = group.replace(kept_of_heads=(most,) * group.key.shape[1]).empty_state()
        return dataclasses.replace(room, **{name: getattr(state, name) for name in (*_OF_HEADS, "count")})
    padded: dict[str, Any] = {
        name: _places(F.pad(_places(tensor, name), (empty, 0), value=-1 if name == "kept_position" else 0), name)
        for name, tensor in zip(_OF_KEPT_KEYS, state.kept, strict=True)
    }
    return dataclasses.replace(state, **padded)


def _places(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Kept keys and values with their places as the last dimension, and back; of the others they are."""
    return tensor.transpose(-1, -2) if name in ("kept_key", "kept_value") else tensor
