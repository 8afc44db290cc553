"""The definition: quadratic, in float64, written to be read. Every fast path is held to it.

out_i = (sum_{j in near(i)} e_ij v_j + gamma sum_{j in far(i)} f_ij v_j) / (sum_near e_ij + gamma sum_far f_ij)
e_ij = exp(scaling q_i.k_j),       f_ij = psi(alpha q'_i).psi(alpha k'_j) prod_{t=j+1..i} g_t,    x' = x sqrt(scaling)
"""

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.state import RFAState


def reference_attention(call: OperatorCall, output_final_state: bool) -> tuple[torch.Tensor, RFAState | None]:
    """RFA of a float64 call, row by row and document by document; output (B, Hk, G, N, M)."""
    query, key, value, layout, initial_state = call.query, call.key, call.value, call.layout, call.state
    batch, _, _, length, _ = query.shape
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    finals = []
    for row in range(batch):
        state = None if initial_state is None else initial_state.select_rows(torch.tensor([row]))
        token_mask = (
            torch.ones(length, dtype=torch.bool) if layout.token_mask is None else layout.token_mask[row].cpu()
        )
        number = torch.zeros(length) if layout.segment_ids is None else layout.segment_ids[row].cpu()
        slots = token_mask.nonzero().squeeze(-1)
        borders = (number[slots].diff() != 0).nonzero().squeeze(-1) + 1
        for document in torch.tensor_split(slots, borders.tolist()):
            one = slice(row, row + 1)
            q, k, v = query[one, ..., document, :], key[one, :, document], value[one, :, document]
            sequence = _Sequence(k, v, state, call)
            output[one, ..., document, :] = sequence.attend(q)
            state = None
        finals.append(sequence.final_state() if output_final_state else None)
    if not output_final_state:
        return output, None
    fields = ("kv_state", "log_max", "near_key", "near_value", "sink_key", "sink_value", "count")
    return output, RFAState(**{name: torch.cat([getattr(f, name) for f in finals]) for name in fields})


class _Sequence:
    """The keys of one document: those that the state remembers one by one, the new ones, and the far sums."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, state: RFAState | None, call: OperatorCall) -> None:
        window = call.window
        self.window, self.sinks, self.causal = window, call.sink_tokens if window else 0, call.causal
        self.far, self.scaling, self.sink_logits, self.state = call.far, call.scaling, call.sink_logits, state
        self.seen = int(state.count) if state is not None else 0
        self.key, self.value = key, value
        # Without causality an earlier state is a bag of far keys; chunks and sinks are those of the new tokens.
        self.rank = (self.seen if self.causal else 0) + torch.arange(key.shape[2])
        self.new_rank = self.rank
        self.decay, self.forgotten = self._decay(0)
        if state is None or not (window and self.causal):
            return
        # Sinks that are no longer among the near keys, then chunks c0 - 1 and c0.
        first = (self.seen // window - 1) * window
        old = torch.arange(max(first, 0), self.seen)
        sinks_left = torch.arange(min(self.sinks, max(first, 0)))
        self.rank = torch.cat([sinks_left, old, self.rank])
        self.key = torch.cat([state.sink_key[:, :, sinks_left], state.near_key[:, :, old - first], key], dim=2).to(key)
        self.value = torch.cat([state.sink_value[:, :, sinks_left], state.near_value[:, :, old - first], value], 2).to(
            value
        )
        self.decay, self.forgotten = self._decay(len(sinks_left) + len(old))

    def _decay(self, earlier: int) -> tuple[torch.Tensor, torch.Tensor]:
        """sum log g (1, Hk, K) up to each key and (1, Hk) up to the last, from the last of the `earlier` keys on."""
        log_gate = self.far.log_gate(self.key)
        if log_gate is None:
            log_gate = self.key.new_zeros(self.key.shape[:3])
        decay = log_gate.cumsum(-1) - log_gate[..., :earlier].sum(-1, keepdim=True)
        return decay, log_gate[..., earlier:].sum(-1)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Output (1, Hk, G, n, M) of the document's queries."""
        far, scaling, sink_logits = self.far, self.scaling, self.sink_logits
        query_rank, key_rank = self.new_rank[:, None], self.rank[None]
        visible = key_rank <= query_rank if self.causal else torch.ones_like(key_rank <= query_rank)
        near = visible & self._near(query_rank, key_rank)
        keys, values = self.key.unsqueeze(2), self.value.unsqueeze(2)  # (1, Hk, 1, K, D): a group shares them
        exact = torch.where(near, (query @ keys.mT * scaling).exp(), 0.0)
        query_features, query_scale = far.query_features(query, scaling)
        key_features, key_scale = far.key_features(keys, scaling)
        given = self.decay[:, :, len(self.rank) - len(self.new_rank) :].unsqueeze(2)  # (1, Hk, 1, n)
        decay = torch.where(visible, given.unsqueeze(-1) - self.decay[:, :, None, None], 0.0)
        kernel = (query_features @ key_features.mT) * (
            query_scale.unsqueeze(-1) + key_scale.unsqueeze(-2) + decay
        ).exp()
        estimated = torch.where(visible & ~near, kernel, 0.0)
        far_numerator, far_denominator = estimated @ values, estimated.sum(-1)
        if self.state is not None:
            psi = query_features * (query_scale + given).unsqueeze(-1).exp()
            sums = self.state.kv_state.to(query) * self.state.log_max.to(query).exp()[..., None, None]
            carried = psi @ sums.unsqueeze(2)
            far_numerator, far_denominator = far_numerator + carried[..., :-1], far_denominator + carried[..., -1]
        gamma = far.gamma.view(-1, 1, 1) * (far_denominator > 0)
        numerator = exact @ values + gamma.unsqueeze(-1) * far_numerator
        denominator = exact.sum(-1) + gamma * far_denominator
        if sink_logits is not None:
            denominator = denominator + sink_logits.to(query).exp().unsqueeze(-1)
        # Zero where nothing answers: window = 0 and an estimate that is not positive.
        answered = denominator > 0
        quotient = numerator / torch.where(answered, denominator, 1.0).unsqueeze(-1)
        return torch.where(answered.unsqueeze(-1), quotient, 0.0)

    def _near(self, query_rank: torch.Tensor, key_rank: torch.Tensor) -> torch.Tensor:
        if not self.window:
            return torch.zeros_like(key_rank <= query_rank)
        distance = (query_rank // self.window - key_rank // self.window).abs()
        return (distance <= 1) | (key_rank < self.sinks)

    def final_state(self) -> RFAState:
        """The state after the document's last token, its sums not rescaled."""
        count = self.seen + len(self.new_rank)
        window = self.window if self.causal else 0
        sinks = self.sinks if self.causal else 0
        state = RFAState.empty(1, self.key, self.value, self.far.num_components, window, sinks)
        chunk = self.rank // window if window else self.rank
        is_far = (self.rank >= sinks) & (chunk <= count // window - 2) if window else torch.ones_like(self.rank).bool()
        features, log_scale = self.far.key_features(self.key, self.scaling)
        # The sums are relative to the last token.
        decay = self.forgotten.unsqueeze(-1) - self.decay
        weights = torch.where(is_far, (log_scale + decay).exp(), 0.0)
        ones = torch.cat([self.value, torch.ones_like(self.value[..., :1])], dim=-1)
        sums = (features * weights.unsqueeze(-1)).mT @ ones
        if self.state is not None:
            scale = self.state.log_max.to(sums) + self.forgotten
            sums = sums + self.state.kv_state.to(sums) * scale.exp()[..., None, None]
        near_key, near_value = state.near_key.clone(), state.near_value.clone()
        sink_key, sink_value = state.sink_key.clone(), state.sink_value.clone()
        for index, rank in enumerate(self.rank.tolist()):
            if window and rank >= (count // window - 1) * window:
                slot = rank - (count // window - 1) * window
                near_key[:, :, slot], near_value[:, :, slot] = self.key[:, :, index], self.value[:, :, index]
            if rank < sinks:
                sink_key[:, :, rank], sink_value[:, :, rank] = self.key[:, :, index], self.value[:, :, index]
        # The reference keeps its sums unscaled: log_max = 0 (-inf while no key is far).
        some = bool(is_far.any()) or (self.state is not None and bool((self.state.log_max > -torch.inf).any()))
        log_max = torch.full_like(state.log_max, 0.0 if some else -torch.inf)
        return RFAState(sums, log_max, near_key, near_value, sink_key, sink_value, torch.tensor([count]))
