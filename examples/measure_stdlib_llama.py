"""The use of far context by a causal LM: the original against the same model cut to its window, on held-out modules.

    python examples/measure_stdlib_llama.py                  # examples/stdlib-llama
    python examples/measure_stdlib_llama.py FOLDER [FOLDER ...]

Prints, for the original and for the window-only model (the exact window of 64 and 4 sinks of the converted models,
with nothing in place of the far part):

- `ppl@L`: perplexity, exp(nats/token), over windows of L tokens of the held-out modules of the standard library,
- `bpb@L`: bits per byte over the same windows,
- `far@L`: perplexity of the second half of each window only, where every token has far context,
- `copy@G`: perplexity of a span of 128 tokens (its last 120) at its second appearance, G other tokens after the first.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import sdpa_mask

from hf_rfa.data import evaluation_windows, load_documents, tokenize_documents

WINDOW, SINKS = 64, 4
SPAN, SPAN_START = 128, 8  # tokens of a copied span, and how many of them are there to recognise it by


def window_only_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Exact attention to the own chunk of `WINDOW` tokens, the chunk before it and the first `SINKS` tokens.

    Shapes: query (B, H, T, D), key and value (B, H_kv, T, D); no padding, no cache. Returns (B, T, H, D).
    """
    position = torch.arange(query.shape[2])
    chunk = position // WINDOW
    chunks_apart = chunk[:, None] - chunk[None, :]
    causal = position[:, None] >= position[None, :]
    visible = causal & ((chunks_apart <= 1) | (position[None, :] < SINKS))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


@torch.no_grad()
def token_nll(model, input_ids: torch.Tensor) -> torch.Tensor:
    """Loss of every token but the first in nats: (B, T) -> (B, T - 1), one sequence at a time."""
    rows = []
    for sequence in input_ids:
        logits = model(sequence[None], use_cache=False).logits[0, :-1].float()
        rows.append(F.cross_entropy(logits, sequence[1:], reduction="none"))
    return torch.stack(rows)


def copy_sequences(ids: torch.Tensor, bos: int, gap: int, count: int) -> Iterator[torch.Tensor]:
    """`count` times bos, a span, `gap` tokens from elsewhere, and the span again: (1 + 2 * SPAN + gap,) each."""
    step = (len(ids) - gap) // (count + 1)
    for i in range(count):
        span = ids[i * step : i * step + SPAN]
        elsewhere = ids[(i + 1) * step : (i + 1) * step + gap]
        yield torch.cat([torch.tensor([bos]), span, elsewhere, span])


def copy_perplexity(model, ids: torch.Tensor, bos: int, gap: int, count: int = 12) -> float:
    """Perplexity of the last `SPAN - SPAN_START` tokens of spans at their second appearance, `gap` tokens later."""
    sequences = torch.stack(list(copy_sequences(ids, bos, gap, count)))
    return math.exp(token_nll(model, sequences)[:, -(SPAN - SPAN_START) :].mean())


def held_out_tokens(tokenizer) -> tuple[list[torch.Tensor], float]:
    """Tokens of the held-out modules, one LongTensor each, and their mean number of bytes per token."""
    token_lists, num_bytes = tokenize_documents(tokenizer, load_documents("stdlib", "validation"))
    return token_lists, sum(num_bytes) / sum(map(len, token_lists))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[str(Path(__file__).parent / "stdlib-llama")])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--windows", type=int, default=40, help="windows of each context, spread over all modules")
    args = parser.parse_args()
    AttentionInterface.register("window_only", window_only_attention)
    AttentionMaskInterface.register("window_only", sdpa_mask)
    for name in args.models:
        tokenizer = AutoTokenizer.from_pretrained(name)
        token_lists, bytes_per_token = held_out_tokens(tokenizer)
        ids = torch.cat(token_lists)
        for label, attention in (("original", "sdpa"), ("window only", "window_only")):
            model = AutoModelForCausalLM.from_pretrained(
                name, attn_implementation=attention, dtype=torch.float32
            ).eval()
            print(f"{Path(name).name}, {label}:")
            for context in args.contexts:
                nll = token_nll(model, evaluation_windows(token_lists, context, args.windows))
                bpb = nll.mean() / (math.log(2) * bytes_per_token)
                far = nll[:, context // 2 :].mean()
                print(
                    f"  ppl@{context} {nll.mean().exp():.3f}  bpb@{context} {bpb:.3f}  far@{context} {far.exp():.3f}"
                )
            copies = "  ".join(
                f"copy@{gap} {copy_perplexity(model, ids, tokenizer.bos_token_id, gap):.2f}" for gap in (300, 1500)
            )
            print(f"  {copies}", flush=True)


if __name__ == "__main__":
    main()
