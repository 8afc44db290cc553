"""A converted folder in vLLM against the same folder in Transformers: greedy tokens of a few prompts, in float32.

    python scripts/vllm_agreement.py FOLDER TEXT.txt                        # in vLLM's environment
    python scripts/vllm_agreement.py FOLDER TEXT.txt --lengths 40 300 700 --new 24

The prompts are pieces of a text, with so many tokens. vLLM answers all at once, in pieces of at most 256 tokens,
Transformers one after the other. The tokenizer is the folder's, or `--tokenizer`'s. The exit status is 1 where a token
differs; then the gap between the two best logits of Transformers at that place is printed, too: far below 1e-3 it is
rounding that decides.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", help="folder, if it does not lie in the converted one")
    parser.add_argument("--lengths", type=int, nargs="+", default=[40, 150, 300, 700])
    parser.add_argument("--new", type=int, default=24, help="tokens of each answer")
    given = parser.parse_args()
    prompts = read_prompts(given)
    served = in_vllm(given, prompts)
    different = 0
    for prompt, tokens, (expected, gaps) in zip(prompts, served, in_transformers(given, prompts), strict=True):
        same = next((n for n, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1), given.new)
        said = f"prompt of {len(prompt)} tokens: {same} of {given.new} tokens equal, smallest gap {min(gaps):.1e}"
        if same < given.new:
            different += 1
            said += f"; the first other one at a gap of {gaps[same]:.1e}"
        sys.stdout.write(f"{said}\n")
    sys.exit(different > 0)


def read_prompts(given: argparse.Namespace) -> list[list[int]]:
    """Token ids from pieces of the text, one behind the other."""
    from transformers import AutoTokenizer

    import hf_rfa  # noqa: F401  (the folder's config is known by its import)

    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer or given.folder)
    total = sum(given.lengths)
    tokens = tokenizer(given.text.read_text(encoding="utf-8")[: 20 * total]).input_ids
    if len(tokens) < total:
        raise SystemExit(f"The text has {len(tokens)} tokens, but {total} are needed. Take a longer one.")
    starts = [sum(given.lengths[:number]) for number in range(len(given.lengths))]
    return [tokens[start : start + length] for start, length in zip(starts, given.lengths, strict=True)]


def in_vllm(given: argparse.Namespace, prompts: list[list[int]]) -> list[list[int]]:
    """The answers of vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        given.folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_num_seqs=len(prompts),
        max_model_len=max(given.lengths) + given.new, max_num_batched_tokens=256, enable_prefix_caching=False,
        kv_cache_memory_bytes=2**30,
    )  # fmt: skip
    settings = SamplingParams(temperature=0, max_tokens=given.new, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def in_transformers(given: argparse.Namespace, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """The answers of `model.generate`, and how far the best logit was above the second at each token."""
    import torch

    import hf_rfa

    model: Any = hf_rfa.from_pretrained(given.folder, dtype="float32").eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=given.new, eos_token_id=None,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.cat(output.logits).topk(2).values
        answers.append((output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()))
    return answers


if __name__ == "__main__":
    main()
