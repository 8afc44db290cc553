"""Documents packed into one row: RFA beside softmax attention, in the attention alone and in a whole model.

The model is that of `scripts/benchmarks/generate.py` with 4 layers. A row is cut into documents of equal length, which
the model finds in `position_ids` that begin anew, as padding-free collators hand them over. Softmax is then
Transformers' sdpa: torch's `scaled_dot_product_attention` under an N x N mask, which the model makes in each forward
and the attention alone is given. RFA plans its layout in each call. A pass with gradients is a training step without
the optimiser: the loss of all tokens and the gradients of all parameters, or of q, k and v.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import hf_rfa
from benchmarks.device import Meter
from benchmarks.generate import VOCABULARY, models
from benchmarks.setting import Setting
from benchmarks.table import Panel, Result, Table, milliseconds

LAYERS = 4
#: Tokens of a document -> how many times softmax's time a training step of the model may take at most.
GOALS = {4: 1.2, 16: 1.2, 64: 1.2}
#: From this document length on, RFA should be faster.
FASTER_FROM = 1024


def packed(
    meter: Meter,
    setting: Setting,
    *,
    passes: Sequence[str],
    lengths: Sequence[int],
    documents: Sequence[int],
    repeats: int,
) -> Result:
    """One row for each part, pass, length N and length of the documents in it, of those that are not longer than N."""
    table = Table("part", "pass", "N", "document", "softmax (ms)", "RFA (ms)", "RFA / softmax", "goal", text=2)
    rows: list[dict[str, Any]] = []
    pair = models(setting, layers=LAYERS)
    calls = {
        "attention": lambda *row: attention_calls(setting, *row),
        "model": lambda *row: [model_call(model, *row) for model in pair],
    }
    for part, which, length, document in itertools.product(calls, passes, lengths, documents):
        if document > length:
            continue
        softmax, rfa = meter.medians(calls[part](which, length, document), repeats)
        row = {"part": part, "pass": which, "length": length, "document": document}
        rows.append({**row, "softmax_seconds": softmax, "rfa_seconds": rfa})
        times = milliseconds(softmax), milliseconds(rfa), f"{rfa / softmax:.2f}"
        table.add(*row.values(), *times, goal(part, which, document))
    return Result(rows, table.lines, _panels(rows))


def attention_calls(setting: Setting, which: str, length: int, document: int) -> list[Callable[[], object]]:
    """A pass of softmax attention and of RFA over a row of `length` tokens in documents of `document`."""
    backward = which != "forward"
    tensors = setting.tensors(length, backward=backward)
    number = (torch.arange(length, device=setting.device) // document)[None]
    mask = ((number[:, :, None] == number[:, None]).tril())[:, None]
    options, grouped = setting.rfa_options(), setting.key_heads != setting.heads

    def softmax() -> Tensor:
        return F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=grouped)

    def rfa() -> Tensor:
        output = hf_rfa.rfa_attention(*tensors, segment_ids=number, **options)
        assert isinstance(output, Tensor)
        return output

    if not backward:
        return [softmax, rfa]
    gradient = torch.ones_like(tensors[0])  # the value dim is the head dim here

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), tensors, gradient)

    return [both(softmax), both(rfa)]


def model_call(model: PreTrainedModel, which: str, length: int, document: int) -> Callable[[], object]:
    """A pass of a model over a row of `length` tokens in documents of `document`."""
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = (torch.arange(length, device=model.device) % document)[None]

    def forward(**more: Tensor) -> Any:
        return model(input_ids=ids, position_ids=positions, use_cache=False, **more)

    def step() -> None:
        forward(labels=ids).loss.backward()
        model.zero_grad()

    return step if which != "forward" else torch.no_grad()(forward)


def goal(part: str, which: str, document: int) -> str:
    """The goal for RFA's time over softmax's; empty if there is none."""
    if part != "model" or which == "forward":
        return ""
    if document >= FASTER_FROM:
        return "< 1"
    return f"≤ {GOALS[document]:g}" if document in GOALS else ""


def _panels(rows: list[dict[str, Any]]) -> list[Panel]:
    panels = []
    for part, which, length in dict.fromkeys((row["part"], row["pass"], row["length"]) for row in rows):
        chosen = [row for row in rows if (row["part"], row["pass"], row["length"]) == (part, which, length)]
        series = {
            title: [(row["document"], row[f"{name}_seconds"] * 1e3) for row in chosen]
            for name, title in (("softmax", "softmax"), ("rfa", "RFA"))
        }
        panels.append(Panel(f"{part}, {which}, N = {length}", "tokens of a document", "ms", series))
    return panels
