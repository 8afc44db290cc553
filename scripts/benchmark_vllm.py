"""vLLM with a converted model against vLLM with the original: sequences that fit, tokens per second.

    python scripts/benchmark_vllm.py                                      # 2,048 and 8,192 tokens, 1, 8, 32 sequences
    python scripts/benchmark_vllm.py --layers 30 --sequences              # only how many sequences fit
    python scripts/benchmark_vllm.py --tokens 2048 --sequences 1 8

The model is a random Llama of SmolLM2-135M's shape (9 query heads and 3 key heads of 64 dims a layer) with `--layers`
layers; in the converted one every fourth key head is exact, the others have 64 features, a window of 64 and 128 kept
keys. Everything is float32 on the CPU, eagerly, in one process for each model and length.

*Sequences that fit* is vLLM's own figure for the cache space given, each with as many tokens as the model's limit.
*Prefill* is the first prompt alone. For decoding, N requests share that prompt (vLLM's prefix cache holds it once, so
that it is computed once; softmax then reads the same memory for all of them, which caches speed up), or each has a
prompt of its own, as users do (`--distinct`; reading them takes as long as it takes). The steps that count are those
in which all of them decode, at least `--new`: with 64, each sequence fills a window once. Times are CPU seconds of the
process (user and system), so that other work does not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GIB = 2**30
#: The most tokens of a step.
BUDGET = 2048
COLUMNS = ("model", "tokens", "block", "sequences that fit", "prefill tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="of a prompt and its answer")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8, 32], help="at once; none: do not decode")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer while all decode")
    parser.add_argument("--distinct", action="store_true", help="a prompt of its own for each sequence")
    parser.add_argument("--space", type=float, default=2.0, help="for the cache, GiB")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        sys.stdout.write(f"\n{json.dumps(measure(given))}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder), given.layers)
        rows = [worker(name, path, length, given) for length in given.tokens for name, path in models.items()]
    heads = [*COLUMNS, *(f"decode tokens/s, {n} at once" for n in given.sequences)]
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    sys.stdout.write("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def write_models(folder: Path, layers: int) -> dict[str, Path]:
    """The original and the converted model by name, each in a folder of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_rfa

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=65536, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    paths = {name: folder / name for name in ("original", "converted")}
    model.save_pretrained(paths["original"])
    exact = [(layer, head) for layer in range(layers) for head in range(3) if (3 * layer + head) % 4 == 0]
    settings = hf_rfa.RFAConfig(softmax_heads=exact, num_features=64, window=64, kept_keys=128, alpha=0.3)
    hf_rfa.save_pretrained(hf_rfa.convert(model, settings, calibrate=False), paths["converted"])
    return paths


def worker(name: str, path: Path, length: int, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one model at one length in a process of its own."""
    options = ["--sequences", *map(str, given.sequences), "--new", str(given.new), "--space", str(given.space)]
    options += ["--distinct"] if given.distinct else []
    command = [sys.executable, __file__, "--worker", str(path), "--tokens", str(length), *options]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return {"model": name, "tokens": length, **json.loads(done.stdout.splitlines()[-1])}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model at one length."""
    import torch
    from vllm import LLM, SamplingParams

    [length] = given.tokens
    llm = LLM(
        given.worker, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=length,
        max_num_seqs=max(given.sequences, default=1), max_num_batched_tokens=BUDGET, enable_prefix_caching=True,
        kv_cache_memory_bytes=int(given.space * GIB),
    )  # fmt: skip
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    found: dict[str, Any] = {
        "block": cache.block_size,
        "sequences that fit": round(cache.kv_cache_max_concurrency, 1),
        "prefill tokens/s": "",
    }
    if not given.sequences:
        return found
    generator = torch.Generator().manual_seed(0)

    def draw(longest: int) -> list[int]:
        return torch.randint(5, 4096, (length - longest - 2,), generator=generator).tolist()

    def run(prompts: list[list[int]], new: int, name: str) -> tuple[float, float]:
        """CPU seconds up to the first token of all; and of a step from there to the end of the first answer."""
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        for number, tokens in enumerate(prompts):
            engine.add_request(f"{name}/{number}", {"prompt_token_ids": tokens}, settings)
        start, begun, ended, times = time.process_time(), set(), False, []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            begun |= {output.request_id for output in outputs}
            if len(begun) == len(prompts) and not ended:
                times.append(time.process_time() - start)
            ended = ended or any(output.finished for output in outputs)
        return times[0], (times[-1] - times[0]) / max(1, len(times) - 1)

    prompt = draw(given.new)
    found["prefill tokens/s"] = round(len(prompt) / run([prompt], 1, "prefill")[0])
    for count in given.sequences:
        if given.distinct:  # the first one decodes while the others are read
            new = given.new + count * -(-length // BUDGET)
            prompts = [draw(new) for _ in range(count)]
        else:
            new, prompts = given.new, [[*prompt, 5 + number] for number in range(count)]
        _, step = run(prompts, new, f"decode{count}")
        found[f"decode tokens/s, {count} at once"] = round(count / step, 1)
    return found


if __name__ == "__main__":
    main()
