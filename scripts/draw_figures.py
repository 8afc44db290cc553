"""The figures of docs/how_it_works.md, drawn from what the code computes.

    python scripts/draw_figures.py --output docs/figures

near.png and kept.png: which keys each query sees exactly, by the operator's definition, on random queries and keys.
far.png: the estimate of exp(q.k) by random features. exact.png: what two heads of the embedded model attend to.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_rfa
from hf_rfa.evaluation.compare import default_model
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.features.omega import draw_omega
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.reference import reference_exact_keys
from hf_rfa.ops.settings import AttentionSettings

SEED = 0
DIM = 32
#: Of each key that a query sees: not at all, by features, in the window, a sink, kept.
COLOURS = ["#ffffff", "#dbe7f3", "#1f5f99", "#6aa84f", "#e69138"]
NAMES = ["", "far: estimated by features", "near: its chunk and the one before", "sinks", "kept keys"]
HIDDEN, FAR, NEAR, SINK, KEPT = range(5)


def kernel(feature_map: str, num_features: int, alpha: float, draw: int = 0) -> FarKernel:
    """The far kernel of one head, not calibrated."""
    omega = draw_omega(1, num_features, DIM, kind="sphere", seed=SEED, layer=0, draw=draw)
    zeros = torch.zeros(1, DIM)
    return FarKernel(
        (feature_map,), omega, alpha=torch.tensor([alpha]), gamma=torch.ones(1), proposal=torch.zeros(1),
        query_center=zeros, key_center=zeros,
    )  # fmt: skip


def seen(length: int, window: int, sinks: int, kept: int) -> torch.Tensor:
    """(length, length): how each query sees each key, as an index into `COLOURS`."""
    generator = torch.Generator().manual_seed(SEED)
    query, key = torch.randn(2, 1, 1, length, DIM, generator=generator, dtype=torch.float64)
    query += query.mean(dim=2, keepdim=True)  # some keys matter to many queries, as in a text
    key[:, :, ::9] += 6 * query.mean(dim=2, keepdim=True)
    settings = AttentionSettings(window=window, sink_tokens=sinks, kept_keys=kept, scaling=DIM**-0.5)
    call = OperatorCall.of(query, key, key, kernel("positive", 8, 0.25), settings, TokenLayout())
    exact = reference_exact_keys(call)[0, 0]
    place = torch.arange(length)
    near = (place[:, None] // window - place // window).abs() <= 1
    how = torch.full((length, length), FAR)
    how[exact] = KEPT
    how[exact & (place < sinks)] = SINK
    how[exact & near] = NEAR
    how[place > place[:, None]] = HIDDEN
    return how


def draw_seen(ax: Axes, how: torch.Tensor) -> None:
    """One map of queries against keys."""
    ax.imshow(how, cmap=ListedColormap(COLOURS), vmin=0, vmax=len(COLOURS) - 1, interpolation="none")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    there = [index for index in range(1, len(COLOURS)) if (how == index).any()]
    ax.legend(handles=[Patch(color=COLOURS[i], label=NAMES[i]) for i in there], loc="upper right", frameon=False)


def near() -> Figure:
    """The window and the sinks."""
    figure, ax = plt.subplots(figsize=(5, 5))
    draw_seen(ax, seen(96, window=16, sinks=2, kept=0))
    ax.set_title("window=16, sink_tokens=2, kept_keys=0")
    return figure


def kept() -> Figure:
    """The same with kept keys."""
    figure, ax = plt.subplots(figsize=(5, 5))
    draw_seen(ax, seen(96, window=16, sinks=2, kept=6))
    ax.set_title("window=16, sink_tokens=2, kept_keys=6")
    return figure


def far() -> Figure:
    """Estimates of the kernel against the kernel, with and without tempering."""
    generator = torch.Generator().manual_seed(SEED)
    query, key = torch.randn(2, 1, 1, 400, DIM, generator=generator, dtype=torch.float64)
    scaling = DIM**-0.5
    true = (query * key).sum(-1).flatten() * scaling
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.8), sharex=True, sharey=True)
    for ax, alpha in zip(axes, (1.0, 0.5, 0.25), strict=True):
        for number, colour in ((64, "#e69138"), (1024, "#1f5f99")):
            psi = kernel("hyperbolic", number, alpha).to(torch.float64)
            (q, q_log), (k, k_log) = psi.query_features(query, scaling), psi.key_features(key, scaling)
            estimate = (q * k).sum(-1).log() + q_log + k_log
            ax.scatter(true, estimate.flatten(), s=7, color=colour, label=f"{number} features", alpha=0.6)
        ends = [float(true.min()), float(true.max())]
        ax.plot(ends, ends, color="black", linewidth=1, label="exact")
        ax.set_title(f"alpha={alpha:g}")
        ax.set_xlabel("log exp(q·k)")
        ax.legend(frameon=False, loc="upper left")
    axes[0].set_ylabel("log of the estimate")
    return figure


def exact() -> Figure:
    """The attention of the head that costs most and of the one that costs least, on a text with a repeated passage."""
    folder = default_model()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(source[:8000])["input_ids"])
    text = torch.cat([ids[:80], ids[400:560], ids[:80]])[None]
    with torch.no_grad():
        weights = model(text, output_attentions=True).attentions
    converted = AutoModelForCausalLM.from_pretrained(folder)
    hf_rfa.convert(converted, hf_rfa.RFAConfig(softmax_heads="auto"), progress=False)
    ranking = hf_rfa.calibration_report(converted).ranking
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6))
    for ax, (layer, head, cost), what in zip(axes, (ranking[0], ranking[-1]), ("costliest", "cheapest"), strict=True):
        mean = weights[layer][0, head * group : (head + 1) * group].mean(0)
        ax.imshow(mean.sqrt(), cmap="Blues", vmax=0.7)
        ax.set_title(f"the {what} head to estimate: layer {layer}, key head {head}\n{cost:.2g} nats/token")
        ax.set_xlabel("key")
    axes[0].set_ylabel("query")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="Folder for the figures.")
    parser.add_argument("--only", nargs="+", default=["near", "kept", "far", "exact"], help="Some of the figures.")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    plt.rcParams["font.size"] = 9
    for name in options.only:
        figure = {"near": near, "kept": kept, "far": far, "exact": exact}[name]()
        figure.savefig(options.output / f"{name}.png", bbox_inches="tight", dpi=100)
        plt.close(figure)


if __name__ == "__main__":
    main()
