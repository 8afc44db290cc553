"""Models whose weights are set by hand, or their answers made by rule, so that it is known what must be found."""

import torch
from conversions import converted
from families import llama
from transformers.modeling_outputs import CausalLMOutput


def harmful_and_helpful():
    """One layer, two heads of dim 16: q, k of head 0 are huge and constant (RoPE alone decides), of head 1 zero."""
    model = llama(
        intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        constant = torch.zeros(99, 32)
        constant[:, 0] = 1.0  # the same for every token, what q and k read
        constant[:, 1:] = 0.3 * torch.randn(99, 31, generator=torch.Generator().manual_seed(0))
        model.model.embed_tokens.weight.copy_(constant)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.weight[:16, 0] = 3.0
    return converted(model, sink_tokens=0)


PAIRS = 45


def retrieving():
    """One layer: key head 0 averages, key head 1 of token 50 + j looks up token 5 + j (its mirror image)."""
    dim = 64
    model = llama(
        hidden_size=dim, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=dim,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )  # fmt: skip
    attention = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    mirror = torch.diag(torch.cat([torch.ones(dim // 2), -torch.ones(dim // 2)]))
    with torch.no_grad():
        embedding = torch.randn(99, dim, generator=generator)
        embedding[5 + PAIRS : 5 + 2 * PAIRS] = embedding[5 : 5 + PAIRS] @ mirror
        model.model.embed_tokens.weight.copy_(embedding)
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        attention.q_proj.weight[dim:].copy_(2 * mirror)
        attention.k_proj.weight[dim:].copy_(2 * torch.eye(dim))
        attention.v_proj.weight.copy_(torch.randn(2 * dim, dim, generator=generator) / 8)
        attention.o_proj.weight.copy_(torch.cat([torch.eye(dim), torch.eye(dim)], dim=1))
    return model


def looked_up():
    """All tokens 5 + j, then all tokens 50 + j, in orders of their own."""
    generator = torch.Generator().manual_seed(0)
    order = [5 + PAIRS * half + torch.randperm(PAIRS, generator=generator) for half in (0, 1)]
    return torch.cat(order)[None]


class Copier(torch.nn.Module):
    """Certain of the token that followed the last earlier appearance of the latest `match` tokens, within `reach`."""

    device = torch.device("cpu")

    def __init__(self, reach: int, match: int = 1, vocabulary: int = 1000) -> None:
        super().__init__()
        self.reach, self.match, self.vocabulary = reach, match, vocabulary

    def forward(self, input_ids, use_cache=False):
        ids, match = input_ids[0].tolist(), self.match
        logits = torch.zeros(1, len(ids), self.vocabulary)
        for i in range(match, len(ids)):
            latest = ids[i - match + 1 : i + 1]
            for j in range(i - 1, max(i - self.reach, match - 1) - 1, -1):
                if ids[j - match + 1 : j + 1] == latest:
                    logits[0, i, ids[j + 1]] = 20.0
                    break
        return CausalLMOutput(logits=logits)
