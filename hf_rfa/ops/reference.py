"""The definition: quadratic, in float64, written to be read. Every fast path is tested against it.

out_i = (sum_{j in exact(i)} e_ij v_j + gamma sum_{j in far(i)} f_ij v_j) / (sum_exact e_ij + gamma sum_far f_ij)
e_ij = exp(scaling q_i.k_j),       f_ij = psi(alpha q'_i).psi(alpha k'_j) prod_{t=j+1..i} g_t,    x' = x sqrt(scaling)
exact(i) = near(i), the sinks, and the keys that the chunk of i keeps, see `ops.kept_keys`; without causality the
keys that the document keeps, see `ops.kept_encoder_keys`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hf_rfa.ops import kept_encoder_keys, kept_keys
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.state import RFAState


def reference_attention(call: OperatorCall) -> tuple[torch.Tensor, RFAState | None]:
    """RFA of a float64 call, row by row and document by document; output (B, Hk, G, N, M).

    It is computed on the CPU, where its masks are, and returned to the call's device.
    """
    device, call = call.query.device, call.cpu()
    output = call.query.new_zeros(*call.query.shape[:-1], call.value.shape[-1])
    finals = {}
    for row, document, query, sequence in _documents(call):
        output[row : row + 1, ..., document, :] = sequence.attend(query)
        if call.output_final_state:
            finals[row] = sequence.final_state()  # that of the row's last document
    state = RFAState.cat(list(finals.values())).to(device) if call.output_final_state else None
    return output.to(device), state


@torch.no_grad()
def reference_exact_keys(call: OperatorCall) -> torch.Tensor:
    """exact(i) of a float64 call without an earlier state: (B, Hk, N, N) bool on the CPU, queries first."""
    call = call.cpu()
    batch, heads, _, length, _ = call.query.shape
    exact = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row, document, query, sequence in _documents(call):
        _, _, exact[row, :, document[:, None], document] = sequence.weights(query)
    return exact


def _documents(call: OperatorCall) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, "_Sequence"]]:
    """Each document's row, slots (n,), queries (1, Hk, G, n, D) and keys; the row's first one continues its state."""
    query, key, value, layout = call.query, call.key, call.value, call.layout
    length = query.shape[3]
    for row in range(len(query)):
        state = None if call.state is None else call.state.select_rows(torch.tensor([row]))
        token_mask = (
            torch.ones(length, dtype=torch.bool) if layout.token_mask is None else layout.token_mask[row].cpu()
        )
        number = torch.zeros(length) if layout.segment_ids is None else layout.segment_ids[row].cpu()
        slots = token_mask.nonzero().squeeze(-1)
        borders = (number[slots].diff() != 0).nonzero().squeeze(-1) + 1
        one = slice(row, row + 1)
        for document in torch.tensor_split(slots, borders.tolist()):
            sequence = _Sequence(key[one, :, document], value[one, :, document], state, call)
            yield row, document, query[one, ..., document, :], sequence
            state = None


class _Sequence:
    """The keys of one document: those that the state holds individually, the new ones, and the far sums.

    The state's individual keys are its kept keys, then sinks that are no longer near, then chunks c0 - 1 and c0.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, state: RFAState | None, call: OperatorCall) -> None:
        window = call.window
        self.window, self.sinks, self.causal = window, call.sink_tokens if window else 0, call.causal
        self.far, self.scaling, self.sink_logits, self.state = call.far, call.scaling, call.sink_logits, state
        self.kept_keys = call.kept_keys
        self.seen = int(state.count) if state is not None else 0
        self.key, self.value = key, value
        # Without causality an earlier state consists of far keys only; chunks and sinks are those of the new tokens.
        self.new_rank = (self.seen if self.causal else 0) + torch.arange(key.shape[2])
        self.rank = self.new_rank.expand(key.shape[1], -1)  # (Hk, K), -1 where there is no key
        self.mass = key.new_zeros(key.shape[1], call.query.shape[2], key.shape[2])  # (Hk, G, K)
        self.decay, self.forgotten = self._decay(0)
        if state is not None and window and self.causal:
            self._remember(state)
        kept = torch.arange(self.rank.shape[1]) < (self.kept_keys if self.seen and self.causal else 0)
        self.kept = kept & (self.rank >= 0)

    def _remember(self, state: RFAState) -> None:
        """Prepend the keys that the state holds individually."""
        first = (self.seen // self.window - 1) * self.window
        old = torch.arange(max(first, 0), self.seen)
        sinks_left = torch.arange(min(self.sinks, max(first, 0)))
        keys, values = [state.sink_key[:, :, sinks_left]], [state.sink_value[:, :, sinks_left]]
        masses = [torch.zeros(*self.mass.shape[:2], len(sinks_left))]
        keys, values = [*keys, state.near_key[:, :, old - first]], [*values, state.near_value[:, :, old - first]]
        rank, decay = torch.cat([sinks_left, old]).expand(self.key.shape[1], -1), None
        if state.kept_key is not None:
            kept_key, kept_value, position, kept_decay, mass = state.kept
            keys, values = [kept_key, *keys], [kept_value, *values]
            masses = [mass[0, ..., : self.kept_keys], *masses, mass[0, ..., self.kept_keys + old - first]]
            rank, decay = torch.cat([position[0], rank], dim=1), -kept_decay.to(self.key)
            self.mass = torch.cat([*(m.to(self.mass) for m in masses), self.mass], dim=-1)
        key, value = self.key, self.value
        self.key, self.value = (
            torch.cat([*(k.to(key) for k in keys), key], 2),
            torch.cat([*(v.to(value) for v in values), value], 2),
        )
        self.rank = torch.cat([rank, self.rank], dim=1)
        self.decay, self.forgotten = self._decay(rank.shape[1])
        if decay is not None:
            self.decay = torch.cat([decay, self.decay[..., self.kept_keys :]], dim=-1)

    def _decay(self, earlier: int) -> tuple[torch.Tensor, torch.Tensor]:
        """sum log g (1, Hk, K) up to each key and (1, Hk) up to the last, from the last of the `earlier` keys on."""
        log_gate = self.far.log_gate(self.key)
        if log_gate is None:
            log_gate = self.key.new_zeros(self.key.shape[:3])
        decay = log_gate.cumsum(-1) - log_gate[..., :earlier].sum(-1, keepdim=True)
        return decay, log_gate[..., earlier:].sum(-1)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Output (1, Hk, G, n, M) for the document's queries."""
        far, scaling, sink_logits = self.far, self.scaling, self.sink_logits
        keys, values = self.key.unsqueeze(2), self.value.unsqueeze(2)  # (1, Hk, 1, K, D): one per group of queries
        weights, visible, near = self.weights(query)
        visible, near = visible[:, None], near[:, None]  # (Hk, 1, n, K)
        exact = torch.where(near, weights, 0.0)
        query_features, query_scale = far.query_features(query, scaling)
        key_features, key_scale = far.key_features(keys, scaling)
        given = self.decay[:, :, self.decay.shape[2] - len(self.new_rank) :].unsqueeze(2)  # (1, Hk, 1, n)
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
        if far.far_limit is not None and self.window:
            # A constant of the backward pass: the limit of a share does not say how to change q or k.
            allowed = exact.sum(-1) if sink_logits is None else exact.sum(-1) + sink_logits.exp().unsqueeze(-1)
            allowed = allowed * far.far_limit.view(-1, 1, 1)
            above = (far.far_limit.view(-1, 1, 1) > 0) & (gamma * far_denominator > allowed)
            gamma = gamma * torch.where(above, allowed / (gamma * far_denominator), 1.0).detach()
        numerator = exact @ values + gamma.unsqueeze(-1) * far_numerator
        denominator = exact.sum(-1) + gamma * far_denominator
        if sink_logits is not None:
            denominator = denominator + sink_logits.to(query).exp().unsqueeze(-1)
        # Zero without any weight: window = 0 and an estimate that is not positive.
        answered = denominator > 0
        quotient = numerator / torch.where(answered, denominator, 1.0).unsqueeze(-1)
        return torch.where(answered.unsqueeze(-1), quotient, 0.0)

    def weights(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """exp(s q.k) (1, Hk, G, n, K), and which keys each query sees, and sees exactly, (Hk, n, K) bool."""
        weights = (query @ self.key.unsqueeze(2).mT * self.scaling).exp()
        visible, exact = self._visible(), self._near()
        if self.kept_keys:
            kept = self._choose(weights, visible, exact) if self.causal else self._choose_once(weights, exact)
            exact = exact | kept
        return weights, visible, visible & exact

    def _visible(self) -> torch.Tensor:
        """(Hk, n, K) bool: which keys each new token may see."""
        there = (self.rank >= 0)[:, None]
        return (
            there & (self.rank[:, None] <= self.new_rank[:, None])
            if self.causal
            else there.expand(-1, len(self.new_rank), -1)
        )

    def _near(self) -> torch.Tensor:
        """(Hk, n, K) bool: which keys are near to each new token, or sinks."""
        key_rank, query_rank = self.rank[:, None], self.new_rank[:, None]
        if not self.window:
            return torch.zeros_like(key_rank <= query_rank)
        distance = (query_rank // self.window - key_rank // self.window).abs()
        return (distance <= 1) | (key_rank < self.sinks)

    @torch.no_grad()
    def _choose(self, weights: torch.Tensor, visible: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        """(Hk, n, K) bool: the keys kept at each new token, chosen chunk by chunk from exp(s q.k) (1, Hk, G, n, K)."""
        chunk_of_query, chunk_of_key = self.new_rank // self.window, self.rank // self.window
        kept = torch.zeros_like(visible)
        for chunk in chunk_of_query.unique().tolist():
            rows = chunk_of_query == chunk
            kept[:, rows] = self.kept[:, None]
            exact = visible[:, rows] & (near[:, rows] | self.kept[:, None])
            share = torch.where(exact[:, None], weights[0, :, :, rows], 0.0)
            total = share.sum(-1, keepdim=True)
            if self.sink_logits is not None:
                total = total + self.sink_logits.to(total).exp()[..., None, None]
            counts = self.new_rank[rows, None] - self.rank[:, None] >= kept_keys.least_distance(self.window)
            self.mass = self.mass + (share / total * counts[:, None]).sum(2)
            if self.new_rank[-1] + 1 >= (chunk + 1) * self.window:  # the chunk is full
                rivals = self.kept | ((chunk_of_key == chunk - 1) & (self.rank >= self.sinks))
                position, count = torch.where(rivals, self.rank, -1), (chunk + 1) * self.window
                score = kept_keys.scores(self.mass, self.value[0].norm(dim=-1), position, count, self.window)
                _, staying = kept_keys.split(score, min(self.kept_keys, score.shape[1]))
                self.kept = torch.zeros_like(self.kept).scatter(1, staying, True) & rivals
        return kept

    @torch.no_grad()
    def _choose_once(self, weights: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        """(Hk, 1, K) bool: the keys kept for all queries, from exp(s q.k) (1, Hk, G, n, K) and near (Hk, n, K)."""
        ranks = kept_encoder_keys.asked_ranks(np.array([len(self.new_rank)]))[0]
        share = weights[0, :, :, ranks]
        total = share.sum(-1, keepdim=True)
        if self.sink_logits is not None:
            total = total + self.sink_logits.to(total).exp()[..., None, None]
        counts = ~near[:, ranks]
        mass = (share / total * counts[:, None]).sum(2)
        score = kept_encoder_keys.scores(mass, self.value[0].norm(dim=-1), counts.sum(1))
        kept = kept_encoder_keys.best(score, self.kept_keys)
        return (kept.unsqueeze(-1) == torch.arange(score.shape[1])).any(1).unsqueeze(1)

    def final_state(self) -> RFAState:
        """The state after the document's last token; its sums are not rescaled."""
        count = self.seen + len(self.new_rank)
        window = self.window if self.causal else 0
        sinks = self.sinks if self.causal else 0
        kept_keys = self.kept_keys if self.causal else 0
        size = window, sinks, kept_keys, self.mass.shape[1]
        state = RFAState.empty(1, self.key, self.value, self.far.num_components, *size)
        chunk = self.rank // window if window else self.rank
        is_far = (self.rank >= sinks) & ~self.kept & (chunk <= count // window - 2) if window else self.rank >= 0
        features, log_scale = self.far.key_features(self.key, self.scaling)
        # Decay is relative to the last token.
        decay = self.forgotten.unsqueeze(-1) - self.decay
        weights = torch.where(is_far, (log_scale + decay).exp(), 0.0)
        ones = torch.cat([self.value, torch.ones_like(self.value[..., :1])], dim=-1)
        sums = (features * weights.unsqueeze(-1)).mT @ ones
        if self.state is not None:
            scale = self.state.log_max.to(sums) + self.forgotten
            sums = sums + self.state.kv_state.to(sums) * scale.exp()[..., None, None]
        tables: dict[str, Any] = {n: t.clone() for n, t in vars(state).items() if isinstance(t, torch.Tensor)}
        for head, ranks in enumerate(self.rank.tolist()):
            held = [index for index in range(len(ranks)) if self.kept[head, index]] if kept_keys else []
            places = {index: kept_keys - len(held) + place for place, index in enumerate(held)}
            for index, rank in enumerate(ranks):
                slot = rank - (count // window - 1) * window if window else -1
                if rank >= 0 and slot >= 0:
                    tables["near_key"][0, head, slot] = self.key[0, head, index]
                    tables["near_value"][0, head, slot] = self.value[0, head, index]
                    if kept_keys:
                        tables["mass"][0, head, :, kept_keys + slot] = self.mass[head, :, index]
                if 0 <= rank < sinks:
                    tables["sink_key"][0, head, rank] = self.key[0, head, index]
                    tables["sink_value"][0, head, rank] = self.value[0, head, index]
                if index in places:
                    place = places[index]
                    tables["kept_key"][0, head, place] = self.key[0, head, index]
                    tables["kept_value"][0, head, place] = self.value[0, head, index]
                    tables["kept_position"][0, head, place] = rank
                    tables["kept_decay"][0, head, place] = decay[0, head, index]
                    tables["mass"][0, head, :, place] = self.mass[head, :, index]
        # The reference does not scale its sums: log_max = 0 (-inf while no key is far).
        before = self.state is not None and bool((self.state.log_max > -torch.inf).any())
        log_max = torch.full_like(state.log_max, 0.0 if before or bool(is_far.any()) else -torch.inf)
        return RFAState(**{**tables, "kv_state": sums, "log_max": log_max, "count": torch.tensor([count])})
