"""Divergence of a saved conversion from its original by position, in texts longer than those it was calibrated on.

    python scripts/experiments/beyond_calibration.py --original MODEL --converted FOLDER --data DATA
        --output results/kept-keys/NAME.md [--context 4096] [--passages 2] [--block 512]

Three rows: the conversion as it is; without the limit of its far parts (`far_limit`), which grow exponentially with
the position because their centres are means of rotated keys; and without far parts. KL(original || conversion) in
nats/token, teacher-forced, of passages of the validation split's documents; the columns end at the named positions.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.options import Settings, option
from hf_rfa.runtime.adapters import named_adapters

#: Passages begin this far behind the start of a document, past prefaces and tables of contents.
SKIPPED = 12_000
#: Tokens whose logits are held at once.
LOGITS = 256


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    original: str = option("Folder or hub id of the original.")
    converted: str = option("Folder of its conversion.")
    data: str = option(SOURCE_HELP)
    output: Path = option("File of the table, Markdown.")
    context: int = option("Length of the passages, tokens.", 4096, least=2)
    passages: int = option("Passages, one of each document.", 2, least=1)
    block: int = option("Positions per column.", 512, least=1)


def main(arguments: list[str]) -> None:
    options, started = parse_arguments(Options, arguments, __doc__), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(options.original)
    documents = tokenize_documents(tokenizer, load_documents(options.data, "validation"))[0]
    long = [ids for ids in documents if len(ids) >= SKIPPED + options.context][: options.passages]
    passages = [ids[SKIPPED : SKIPPED + options.context] for ids in long]
    original = AutoModelForCausalLM.from_pretrained(options.original, dtype=torch.float32).eval()
    converted = hf_rfa.from_pretrained(options.converted).eval()
    wanted = [hidden_states(original, ids) for ids in passages]
    rows = []
    for name, changed in (("as converted", ()), ("no limit", ("far_limit",)), ("no far part", ("gamma",))):
        switch_off(converted, changed)
        found = [divergences(original, want, converted, ids) for want, ids in zip(wanted, passages, strict=True)]
        rows.append((name, torch.stack(found).mean(0).split(options.block)))
    ends = [str(min(end + options.block, options.context)) for end in range(0, options.context, options.block)]
    lines = ["| | " + " | ".join([*ends, "mean", "greedy"]) + " |", "|---|" + "---:|" * (len(ends) + 2)]
    for name, blocks in rows:
        kl, same = (torch.cat(blocks)[:, column].mean().item() for column in (0, 1))
        cells = [f"{block[:, 0].mean():.4f}" for block in blocks]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{kl:.4f}", f"{100 * same:.1f} %"]) + " |")
    text = "\n".join([*lines, "", f"{time.process_time() - started:.0f} CPU-seconds.", ""])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    print(text)


def switch_off(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Set these tensors of all far kernels to 0, and what was set to 0 before to what it was."""
    for _, _, adapter in named_adapters(model):
        kept = vars(adapter).setdefault(
            "kept_tensors", {n: getattr(adapter, n).clone() for n in ("far_limit", "gamma")}
        )
        adapter.set_kernel(adapter.feature_maps, **{n: tensor * (n not in names) for n, tensor in kept.items()})


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the head gets, (N, d): logits of a whole passage would take more memory than the model."""
    with torch.no_grad():
        return model.base_model(ids.unsqueeze(0), use_cache=False)[0][0]


def divergences(
    original: PreTrainedModel, want: torch.Tensor, converted: PreTrainedModel, ids: torch.Tensor
) -> torch.Tensor:
    """KL and whether the greedy token is the same, (N, 2), for each position."""
    got, found = hidden_states(converted, ids), []
    head = original.get_output_embeddings()
    with torch.no_grad():
        for p, q in zip(want.split(LOGITS), got.split(LOGITS), strict=True):
            log_p, log_q = head(p).log_softmax(-1), head(q).log_softmax(-1)
            kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            found.append(torch.stack([kl, (log_p.argmax(-1) == log_q.argmax(-1)).float()], dim=-1))
    return torch.cat(found)


if __name__ == "__main__":
    main(sys.argv[1:])
