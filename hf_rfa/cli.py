"""The command line: `hf-rfa compare` and `hf-rfa supported`, also `python -m hf_rfa ...`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hf_rfa
from hf_rfa.config import FEATURE_MAPS
from hf_rfa.errors import ConfigError, RFAError
from hf_rfa.evaluation import report
from hf_rfa.evaluation.compare import compare, default_model
from hf_rfa.evaluation.results import CompareSettings, Comparison
from hf_rfa.supported import OUTCOMES, find, read_matrix

app = typer.Typer(
    help="Random-feature attention (RFA) for pretrained Transformers models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _commands() -> None:
    """Random-feature attention (RFA) for pretrained Transformers models."""


def _option(panel: str, text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)


_D = CompareSettings(model="")  # the defaults, in one place
_CONVERSION, _MEASUREMENT, _TUNING, _RUN = "Conversion", "Measurement", "Calibration and fine-tuning", "Run"


@app.command("compare")
def compare_command(
    model: Annotated[
        str | None,
        _option("What", "Folder or hub id of a causal LM. [dim]default: the embedded 3.5M-parameter model[/dim]"),
    ] = None,
    data: Annotated[
        str,
        _option(
            "What",
            "Long documents: 'stdlib' (the Python standard library, no download), a folder or file of .txt, .md, .py, "
            ".jsonl or .parquet, or the hub id of a dataset. A part is held out for measuring.",
        ),
    ] = _D.data,
    output: Annotated[
        Path, _option("What", "Folder for report.md, report.json, the plots and the converted model.")
    ] = Path(_D.output),
    feature_map: Annotated[
        str, _option(_CONVERSION, f"Feature map of the far keys: {', '.join(FEATURE_MAPS)}.")
    ] = _D.feature_map,
    num_features: Annotated[
        int, _option(_CONVERSION, "Random features per key head (omega vectors).", min=1)
    ] = _D.num_features,
    window: Annotated[
        int, _option(_CONVERSION, "Chunk size of the exact near part: between one and two chunks are exact.", min=1)
    ] = _D.window,
    sink_tokens: Annotated[
        int, _option(_CONVERSION, "First tokens that every query sees exactly.", min=0)
    ] = _D.sink_tokens,
    softmax_heads: Annotated[
        str,
        _option(
            _CONVERSION,
            "Key heads that stay softmax in the last column: 'auto' (the fewest that keep the loss small), a fraction "
            "such as 0.25, or pairs layer:head such as 3:1,2:0.",
        ),
    ] = _D.softmax_heads,
    contexts: Annotated[
        str, _option(_MEASUREMENT, "Context lengths, tokens; each must divide the longest.")
    ] = ",".join(map(str, _D.contexts)),
    eval_windows: Annotated[
        int, _option(_MEASUREMENT, "Held-out windows of the longest context to measure on.", min=1)
    ] = _D.eval_windows,
    copy_gaps: Annotated[
        str, _option(_MEASUREMENT, "Tokens between the two appearances of a span that is to be copied.")
    ] = ",".join(map(str, _D.copy_gaps)),
    speed_contexts: Annotated[
        str,
        _option(
            _MEASUREMENT, "Prompts whose time and cache are measured, tokens; may exceed what the model has learnt."
        ),
    ] = ",".join(map(str, _D.speed_contexts)),
    speed_repeats: Annotated[
        int, _option(_MEASUREMENT, "Timed runs of each model and prompt; medians are given.", min=1)
    ] = _D.speed_repeats,
    new_tokens: Annotated[int, _option(_MEASUREMENT, "Tokens decoded to measure the speed.", min=1)] = _D.new_tokens,
    calibration_batches: Annotated[
        int, _option(_TUNING, "Batches that calibration looks at.", min=1)
    ] = _D.calibration_batches,
    steps: Annotated[
        int, _option(_TUNING, "Fine-tuning steps, the same for all columns; 0 leaves it out.", min=0)
    ] = _D.steps,
    batch_size: Annotated[
        int, _option(_TUNING, "Sequences of the longest context in a batch.", min=1)
    ] = _D.batch_size,
    learning_rate: Annotated[
        float, _option(_TUNING, "Highest learning rate of AdamW (linear warm-up, cosine decay).")
    ] = _D.learning_rate,
    repeat_probability: Annotated[
        float,
        _option(_TUNING, "Share of training sequences with spans repeated from far back.", min=0.0, max=1.0),
    ] = _D.repeat_probability,
    mixed_precision: Annotated[
        str, _option(_TUNING, "'no', 'bf16', or 'auto': bf16 where the hardware multiplies it.")
    ] = _D.mixed_precision,
    seed: Annotated[int, _option(_RUN, "Seed of omega, of calibration and of training batches.", min=0)] = _D.seed,
    threads: Annotated[
        int | None, _option(_RUN, "CPU threads. [dim]default: the cores that are idle at the start[/dim]", min=1)
    ] = _D.threads,
    device: Annotated[str, _option(_RUN, "'auto' (CUDA if there is one), 'cpu', 'cuda' or 'cuda:1'.")] = _D.device,
) -> None:
    """Convert a pretrained model and compare it with its original.

    Prints perplexity, KL divergence, copying, greedy agreement, speed and cache size of four models, right after
    calibration and again after the same brief fine-tuning of all four: [b]original[/b] · [b]window only[/b] (near keys
    and nothing else) · [b]every head linear[/b] · [b]retrieval heads exact[/b]. Without options it needs no network
    and takes some minutes on two cores.
    """
    settings = CompareSettings(
        model=default_model() if model is None else model,
        data=data,
        output=str(output),
        feature_map=feature_map,
        num_features=num_features,
        window=window,
        sink_tokens=sink_tokens,
        softmax_heads=parse_softmax_heads(softmax_heads),
        contexts=_parse_integers("--contexts", contexts),
        eval_windows=eval_windows,
        copy_gaps=_parse_integers("--copy-gaps", copy_gaps),
        calibration_batches=calibration_batches,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        repeat_probability=repeat_probability,
        mixed_precision=mixed_precision,
        speed_contexts=_parse_integers("--speed-contexts", speed_contexts),
        speed_repeats=speed_repeats,
        new_tokens=new_tokens,
        seed=seed,
        threads=threads,
        device=device,
    )
    comparison, converted, tokenizer = compare(settings)
    paths = report.write_report(comparison, output)
    folder = output / "model"
    hf_rfa.save_pretrained(converted, folder)
    tokenizer.save_pretrained(folder)
    print_comparison(comparison)
    Console().print(f"Written: {', '.join(str(path) for path in [*paths, folder])}", soft_wrap=True)


@app.command("supported")
def supported_command(
    name: Annotated[str, typer.Argument(help="Part of a model class or model type, for example llama.")] = "",
    outcome: Annotated[str | None, typer.Option(help=f"Only rows of one outcome: {', '.join(OUTCOMES)}.")] = None,
) -> None:
    """Print which model classes convert, which are refused and why.

    Each class was built as a tiny model, converted, padded, packed, trained for a step, generated from, saved, loaded
    and reverted. What it cannot do besides is noted; "as the original" is what the original cannot do either.
    """
    matrix = read_matrix()
    rows = find(matrix, name, outcome)
    if not rows:
        raise ConfigError(
            f"No model class or model type contains {name!r}. Got no row. Try a shorter part of the name."
        )
    table = Table("class", "model type", "outcome", "notes", title=f"Transformers {matrix.transformers}")
    for row in rows:
        notes = row.reason or "; ".join(f"{stage}: {said}" for stage, said in row.stages.items() if said != "-")
        table.add_row(row.model_class, row.model_type, row.outcome, escape(notes))
    console = Console()
    console.print(table)
    counts = ", ".join(f"{sum(row.outcome == each for row in rows)} {each}" for each in OUTCOMES)
    console.print(f"{len(rows)} rows: {counts}.")


def print_comparison(comparison: Comparison) -> None:
    """Prints the tables of figures and of costs."""
    console = Console()
    tables = [(report.CALIBRATED_TITLE, report.quality_table(comparison.calibrated))]
    if comparison.finetuned:
        finetuned = report.quality_table(report.with_finetuned_original(comparison.finetuned))
        tables.append((report.finetuned_title(comparison), finetuned))
    tables.append(("Time and memory, batch size 1", report.cost_table(comparison)))
    for title, (header, *rows) in tables:
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(header):
            table.add_column(column, justify="right" if number else "left", no_wrap=not number, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    heads = ", ".join(map(str, comparison.softmax_heads)) or "none"
    console.print(
        f"Exact heads (layer, key head): {heads}, of {comparison.key_heads}. {comparison.seconds:.0f} s in all."
    )


def parse_softmax_heads(text: str) -> Any:
    """'auto', a fraction, or 'layer:head,layer:head' as `RFAConfig.softmax_heads` takes it."""
    if text == "auto":
        return text
    try:
        if ":" not in text:
            return float(text)
        return [(int(layer), int(head)) for layer, head in (pair.split(":") for pair in text.split(","))]
    except ValueError:
        raise ConfigError(
            f"`--softmax-heads` must be 'auto', a fraction or pairs layer:head. Got {text!r}. Pass, for example, 0.25 "
            "or 3:1,2:0."
        ) from None


def _parse_integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError:
        raise ConfigError(
            f"`{option}` must be whole numbers with commas between. Got {text!r}. Pass, for example, 512,1024,2048."
        ) from None


def main() -> None:
    """Runs the command line; what went wrong is said in one paragraph, with exit status 1."""
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    try:
        app()
    except (RFAError, FloatingPointError, ImportError, OSError, ValueError) as error:
        message = str(error)
        if isinstance(error, ImportError):
            message += ". Install what is missing, for example with `pip install 'hf_rfa[train]'`."
        Console(stderr=True).print(f"[bold red]Error:[/bold red] {escape(message)}", soft_wrap=True)
        sys.exit(1)
