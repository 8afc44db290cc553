"""Memory of training on one long document: per process when processes share it, over its length when it is cut and
the state is carried.

    python scripts/measure_long_documents.py ranks                     # 1, 2 and 4 processes, forward and backward
    python scripts/measure_long_documents.py ranks --tokens 16384 --softmax_heads 1
    python scripts/measure_long_documents.py carried --plot docs/carried_memory.png
    python scripts/measure_long_documents.py carried --tokens 200000 --softmax_heads 1

Prints a Markdown table. A Llama of 2 layers, width 64, 4 query heads, 2 key heads and a vocabulary of 256 is trained
in float32 on random tokens, one thread per process: memory does not depend on the text. Figures of
`ranks` are the growth of the resident set at its peak above what the process held before, the largest of all
processes; those of `carried` are the whole resident set. Linux only: they are read from /proc/self/status. `carried`
starts itself again, as `ranks` starts its processes, with glibc set to return freed memory.
"""

import argparse
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

WIDTH, LAYERS, HEADS, KEY_HEADS, VOCABULARY = 64, 2, 4, 2, 256
PROCESSES = (1, 2, 4)
CONTEXT = 4096  # tokens of a piece of a cut document
#: Makes glibc return freed memory to the system, so that only memory in use is measured.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ranks = commands.add_parser("ranks", help="one document on several processes")
    ranks.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    ranks.add_argument("--softmax_heads", type=int, nargs="+", default=[0], help="heads that stay softmax, of 4")
    ranks.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    carried = commands.add_parser("carried", help="one document cut in time")
    carried.add_argument("--tokens", type=int, default=1_000_000)
    carried.add_argument("--softmax_heads", type=int, default=0, help="heads that stay softmax, of 4")
    carried.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.command == "carried":
        if not RETURN_MEMORY.items() <= os.environ.items():
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | RETURN_MEMORY)
        measure_carried(given.tokens, given.softmax_heads, given.plot)
    elif given.worker:
        # One write: the processes share the pipe.
        sys.stdout.write(f"{measure_share(given.tokens[0], given.softmax_heads[0])}\n")
    else:
        measure_ranks(given.tokens, given.softmax_heads)


def tiny_model(softmax_heads: int):
    """The converted model in training mode; the exact heads are spread over the layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_rfa

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    heads = [(number % LAYERS, number // LAYERS) for number in range(softmax_heads)]
    # No kept keys, which sequence parallelism does not hand on from process to process.
    rfa = hf_rfa.RFAConfig(feature_map="positive", alpha=0.5, softmax_heads=heads, kept_keys=0)
    return hf_rfa.convert(LlamaForCausalLM(config), rfa, calibrate=False).train()


def resident(field: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}: this script needs Linux.")


def measure_ranks(lengths: list[int], softmax_heads: list[int]) -> None:
    titles = [f"{n} {'process' if n == 1 else 'processes'}, MiB | of one" for n in PROCESSES]
    print("| tokens | heads that stay softmax | " + " | ".join(titles) + " |")
    print("|---:|---:" + "|---:|---:" * len(PROCESSES) + "|")
    for tokens in lengths:
        for heads in softmax_heads:
            peaks = [largest_share(tokens, heads, processes) for processes in PROCESSES]
            cells = " | ".join(f"{peak:,.0f} | {peak / peaks[0]:.2f}" for peak in peaks)
            print(f"| {tokens:,} | {heads} of {LAYERS * KEY_HEADS} | {cells} |", flush=True)


def largest_share(tokens: int, softmax_heads: int, processes: int) -> float:
    """Peak of the process that needs most, MiB."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    own = [__file__, "ranks", "--worker", "--tokens", str(tokens), "--softmax_heads", str(softmax_heads)]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    environment = os.environ | RETURN_MEMORY | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *launcher, *own]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{processes} processes, {tokens} tokens failed:\n{done.stderr}")
    return max(float(line) for line in done.stdout.split())


def measure_share(tokens: int, softmax_heads: int) -> float:
    """One forward and backward pass on this process's share of a document: growth of the peak, MiB."""
    import torch
    import torch.distributed as dist

    from hf_rfa.training.loss import LossModule
    from hf_rfa.training.sequence_parallel import sequence_parallel, shard_batch

    dist.init_process_group("gloo")
    model = tiny_model(softmax_heads)
    loss = LossModule(model, fused=True)

    def run(length: int) -> None:
        ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
        share = shard_batch(ids, dist.get_rank(), dist.get_world_size())
        loss(share.input_ids, share.targets, position_ids=share.position_ids, use_cache=False).backward()

    with sequence_parallel(model, dist.group.WORLD):
        run(1024)  # loads libraries and kernels
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        run(tokens)
        grown = resident("VmHWM") - before
    dist.barrier()
    dist.destroy_process_group()
    return grown


def measure_carried(tokens: int, softmax_heads: int, plot: Path | None) -> None:
    import torch

    from hf_rfa.data import carried_batches
    from hf_rfa.training import FinetuneConfig, finetune

    document = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0))
    started, seen = time.perf_counter(), []

    class Watch:
        def step(self, model) -> None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            seen.append((min(tokens, (len(seen) + 1) * CONTEXT), resident("VmRSS"), peak, time.perf_counter()))

    steps = -(-(tokens - 1) // CONTEXT)
    batches = carried_batches([document], context=CONTEXT, batch_size=1)
    model = tiny_model(softmax_heads)
    finetune(
        model, batches, FinetuneConfig(steps=steps, fused_loss=True, progress=sys.stderr.isatty()), hooks=[Watch()]
    )
    print("| tokens of the document so far | resident, MiB | peak so far, MiB | seconds |\n|---:|---:|---:|---:|")
    marks = [n for n in (10_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000) if n < tokens] + [tokens]
    for mark in marks:
        count, now, peak, clock = next(row for row in seen if row[0] >= mark)
        print(f"| {count:,} | {now:,.0f} | {peak:,.0f} | {clock - started:,.0f} |")
    if plot is not None:
        draw(seen, plot)


def draw(seen: list[tuple], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    counts = [row[0] for row in seen]
    axes.plot(counts, [row[1] for row in seen], "-", label="resident")
    axes.plot(counts, [row[2] for row in seen], "--", label="peak so far")
    axes.set(xlabel="tokens of the document so far", ylabel="MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
