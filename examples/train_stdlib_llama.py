"""Trains the tiny causal LM of `examples/stdlib-llama` on the Python standard library: no download, one CPU core.

    python examples/train_stdlib_llama.py                          # about an hour, into examples/stdlib-llama
    python examples/train_stdlib_llama.py --output DIR             # elsewhere; a run cut short resumes from DIR.ckpt
    python examples/train_stdlib_llama.py --output DIR --export    # write the model of the last checkpoint and stop

Preloading jemalloc makes the loop several times faster where malloc returns the large buffers to the system
(Debian: `apt-get install libjemalloc2`):

    LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1 \
        python examples/train_stdlib_llama.py

The model is a Llama of 3.5M parameters (GQA with 4 query heads and 2 key heads of dim 64, RoPE, context 4096), stored
as float16. About half of its training sequences hold planted repeats of earlier spans, which makes it learn to copy
from far context within a few million tokens. Same seed, same Python version: the same batches.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from measure_stdlib_llama import copy_perplexity, held_out_tokens, token_nll
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_rfa.data import Document, evaluation_windows, load_documents, tokenize_documents, training_batches

SEED = 0
VOCAB_SIZE = 2048
MAX_CONTEXT = 4096
BATCH_TOKENS = 8192  # in every stage, so that one learning rate serves all of them
STAGES = ((512, 900), (1024, 800), (2048, 650), (4096, 100))  # (context, optimiser steps)
REPEAT_PROBABILITY = 0.5
MUON_LR, ADAM_LR = 0.02, 3e-3
WARMUP_STEPS = 50
DECAY_SHARE = 0.35  # of all steps, at the end: the rate falls linearly to zero


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens; lossless on any text, so that indentation survives."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    for document in documents[:50]:
        if fast.decode(fast(document.text, verbose=False).input_ids) != document.text:
            raise RuntimeError(f"The tokenizer does not give {document.name} back unchanged.")
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3.5M parameters, initialised from `SEED`."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.1),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, total: int) -> float:
    """Share of the full learning rate: warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (total - step) / (DECAY_SHARE * total))


def batches(token_lists: list[torch.Tensor], first_step: int) -> Iterator[torch.Tensor]:
    """Batches (B, context) of all stages in turn, from `first_step` on."""
    for stage, (context, steps) in enumerate(STAGES):
        drawn = training_batches(token_lists, context, BATCH_TOKENS // context, SEED + stage, REPEAT_PROBABILITY)
        skipped = min(first_step, steps)
        first_step -= skipped
        yield from itertools.islice(drawn, skipped, steps)


def train_step(model: LlamaForCausalLM, input_ids: torch.Tensor, bos: int) -> float:
    """Forward and backward pass in bfloat16. Returns the mean loss in nats/token."""
    # A bos in front of every other sequence: the model has to do with it (prompts) and without (windows of a text).
    input_ids[::2, 0] = bos
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
    loss.backward()
    return loss.item()


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    partial = path.with_suffix(".partial")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, partial)
    partial.rename(path)  # in one go: a run cut short while writing keeps the checkpoint before it


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    """Restores model and optimisers in place. Returns the number of steps done, 0 without a checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    print(f"resumed from {path} at step {state['step']}")
    return state["step"]


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model (float16 weights, loaded as float32) and tokenizer."""
    half = LlamaForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "stdlib-llama")
    parser.add_argument("--export", action="store_true", help="only write the model of the last checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes-between-checkpoints", type=float, default=4.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    documents = load_documents("stdlib", "train")
    tokenizer = train_tokenizer(documents)
    model = new_model(tokenizer)
    optimizers = new_optimizers(model)
    checkpoint = args.output.with_name(args.output.name + ".ckpt")
    first_step = load_checkpoint(checkpoint, model, optimizers)
    if args.export:
        if not first_step:
            parser.error(f"nothing to export: there is no checkpoint at {checkpoint}. Run without --export first.")
        export(model, tokenizer, args.output)
        return

    token_lists, _ = tokenize_documents(tokenizer, documents)
    held_out, _ = held_out_tokens(tokenizer)
    windows, held_out_ids = evaluation_windows(held_out, 2048, 8), torch.cat(held_out)
    total = sum(steps for _, steps in STAGES)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {sum(map(len, token_lists)):,} training tokens, {total} steps", flush=True)

    saved_at, running = time.monotonic(), None
    progress = tqdm(
        total=total * BATCH_TOKENS, initial=first_step * BATCH_TOKENS, unit="tok", unit_scale=True, mininterval=10
    )
    for step, input_ids in enumerate(batches(token_lists, first_step), start=first_step):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step, total) * group.setdefault("full_lr", group["lr"])
        loss = train_step(model, input_ids, tokenizer.bos_token_id)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss if running is None else 0.98 * running + 0.02 * loss
        progress.update(BATCH_TOKENS)
        progress.set_postfix(step=step + 1, context=input_ids.shape[1], loss=f"{running:.3f}", refresh=False)
        if time.monotonic() - saved_at > 60 * args.minutes_between_checkpoints or step + 1 == total:
            save_checkpoint(checkpoint, model, optimizers, step + 1)
            model.eval()
            perplexity = token_nll(model, windows).mean().exp()
            copy = copy_perplexity(model, held_out_ids, tokenizer.bos_token_id, gap=300, count=6)
            model.train()
            tqdm.write(f"step {step + 1}: held-out ppl@2048 {perplexity:.2f}, copy@300 {copy:.2f}, loss {running:.3f}")
            saved_at = time.monotonic()
    progress.close()
    export(model, tokenizer, args.output)


if __name__ == "__main__":
    main()
