"""vLLM on folders, in a process of its own: greedy tokens of prompts that arrive at random.

    python tests/worker_vllm.py JOBS.json ANSWERS.json

A job is `{"folder": ..., "prompts": [[token ids]], "new": tokens of an answer, "options": of `LLM`}`; for each there
is an answer `{"tokens": [[token ids]], "cached": [tokens], "blocks": tokens of a block, "layers": [[names of what has
a cache] of each rank]}`.
"""

import json
import os
import random
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    jobs = json.loads(Path(sys.argv[1]).read_text())
    answers = []
    for job in jobs:
        answers.append(serve(**job))
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(answers))


def serve(folder: str, prompts: list[list[int]], new: int, options: dict) -> dict:
    from vllm import LLM, SamplingParams

    options = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8,
        "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 2**26, "enable_prefix_caching": False, **options,
    }  # fmt: skip
    llm = LLM(model=folder, skip_tokenizer_init=True, **options)
    engine, layers = llm.llm_engine, [sorted(own) for own in llm.collective_rpc("get_kv_cache_spec")]
    settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    waiting, chance = list(enumerate(prompts)), random.Random(0)
    tokens, cached = [[]] * len(prompts), [0] * len(prompts)
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(len(waiting), chance.randrange(3))):
            number, prompt = waiting.pop(0)
            engine.add_request(f"{number}/", {"prompt_token_ids": prompt}, settings)
        for output in engine.step():
            number = int(output.request_id.split("/")[0])
            tokens[number], cached[number] = list(output.outputs[0].token_ids), output.num_cached_tokens
    blocks = engine.vllm_config.cache_config.block_size
    return {"tokens": tokens, "cached": cached, "blocks": blocks, "layers": layers}


if __name__ == "__main__":
    main()
