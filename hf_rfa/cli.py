"""The command line: `hf-rfa convert`, `compare`, `chat`, `serve`, `supported`, `doctor`; also `python -m hf_rfa`."""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hf_rfa
from hf_rfa.commands.chat import chat
from hf_rfa.commands.convert import convert_folder, how_to_load
from hf_rfa.commands.doctor import examine
from hf_rfa.commands.settings import ChatSettings, ConvertSettings, DoctorSettings
from hf_rfa.config import seen_exactly
from hf_rfa.errors import ConfigError, RFAError
from hf_rfa.evaluation import report
from hf_rfa.evaluation.compare import compare, default_model
from hf_rfa.evaluation.results import CompareSettings, Comparison
from hf_rfa.options import Settings, help_text, option_flag, options_of
from hf_rfa.serving.settings import ServeSettings
from hf_rfa.supported import OUTCOMES, find, read_matrix
from hf_rfa.value_types import describe

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


def _takes(
    settings: type[Settings], *, filled: str = "", arguments: Sequence[str] = ()
) -> Callable[[Callable[[dict[str, Any]], None]], Callable[..., None]]:
    """Make a command of a function that takes {option: text}: the options given, of all those of `settings`.

    Args:
        filled: The option that the command itself fills in if it is not given, as its help says.
        arguments: Required ones that are given without their names.
    """

    def decorate(command: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        def with_options(**texts: str | None) -> None:
            command({name: text for name, text in texts.items() if text is not None})

        kinds: dict[str, Any] = {}
        for name, each in options_of(settings).items():
            if name in arguments:
                kinds[name] = Annotated[str, typer.Argument(help=escape(each.help), metavar=name.upper())]
                continue
            kinds[name] = Annotated[str | None, typer.Option(
                option_flag(name), help=escape(each.help if name == filled else help_text(each)),
                rich_help_panel=each.group or "Input and output", metavar=describe(each.kind, short=True),
                show_default=False,
            )]  # fmt: skip
        signature = inspect.Signature([
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=kind,
                default=inspect.Parameter.empty if name in arguments else None,
            )
            for name, kind in kinds.items()
        ])  # fmt: skip
        # Which of the two Typer reads depends on its version.
        with_options.__signature__, with_options.__annotations__ = signature, kinds  # type: ignore[attr-defined]
        with_options.__doc__ = command.__doc__
        return with_options

    return decorate


@app.command("convert")
@_takes(ConvertSettings, arguments=("model", "output"))
def convert_command(given: dict[str, Any]) -> None:
    """Convert a pretrained model and save it, with its tokenizer, as a folder of its own.

    The near keys of each query stay exact, all others go through random features; calibration fits every head and
    keeps the few that look up single tokens exact. The original is not touched.
    """
    console = Console()
    settings = ConvertSettings.from_dict(given, source="The command line", dashes=True)
    model = convert_folder(settings, lambda line: console.print(escape(line), soft_wrap=True, highlight=False))
    console.print(escape(str(hf_rfa.calibration_report(model))), soft_wrap=True, highlight=False)
    console.print(f"\n{escape(how_to_load(model, settings.output))}", soft_wrap=True, highlight=False)


@app.command("chat")
@_takes(ChatSettings, arguments=("folder",))
def chat_command(given: dict[str, Any]) -> None:
    """Talk with a chat model in the terminal; a converted one's memory does not grow with the conversation.

    Each answer is followed by the size of the cache. Without a terminal the lines of standard input are the user's
    messages.
    """
    console = Console()
    settings = ChatSettings.from_dict(given, source="The command line", dashes=True)
    chat(settings, lambda line: console.print(escape(line), soft_wrap=True, highlight=False))


@app.command("compare")
@_takes(CompareSettings, filled="model")
def compare_command(given: dict[str, Any]) -> None:
    """Convert a pretrained model and compare it with its original.

    Prints perplexity, KL divergence, copying, greedy agreement, speed and cache size of four models, right after
    calibration and again after the same brief fine-tuning of all four: [b]original[/b] · [b]window only[/b] (near keys
    and nothing else) · [b]every head linear[/b] · [b]retrieval heads exact[/b]. `--columns` adds what else the bytes
    of the last one could hold, `--tasks` RULER-style tasks. Without options it needs no network and takes some minutes
    on two cores.
    """
    if "model" not in given:
        given["model"] = default_model()
    settings = CompareSettings.from_dict(given, source="The command line", dashes=True)
    output = Path(settings.output)
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

    Each class was built as a tiny model, converted, run on padded and packed batches, trained for a step, used to
    generate, saved, loaded and reverted. The notes say what does not work; "as the original" means that the original
    cannot do it either.
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


@app.command("serve")
@_takes(ServeSettings, arguments=("folder",))
def serve_command(given: dict[str, Any]) -> None:
    """Serve a model, converted or not, as OpenAI's API: chats, completions, streams, health and metrics.

    Requests are batched as they come, and join and leave the batch at every token. Needs the extra [b]serve[/b].
    """
    settings = ServeSettings.from_dict(given, source="The command line", dashes=True)
    try:
        from hf_rfa.serving.server import serve
    except ImportError as error:
        raise ImportError(f"{error}. The server needs `pip install 'hf_rfa[serve]'`") from error
    serve(settings)


@app.command("doctor")
@_takes(DoctorSettings)
def doctor_command(given: dict[str, Any]) -> None:
    """Print what this machine has and what computes converted layers on it: versions, devices, checks, times.

    Every form that can run is compared with the definition or with PyTorch's, and timed; what is missing is named with
    the command that installs it. The exit status is 1 if a check fails.
    """
    console = Console()
    settings = DoctorSettings.from_dict(given, source="The command line", dashes=True)
    if not examine(settings, lambda line: console.print(escape(line), soft_wrap=True, highlight=False)):
        raise typer.Exit(1)


def print_comparison(comparison: Comparison) -> None:
    """Prints the tables of figures and of costs."""
    console = Console()
    tables = [(report.CALIBRATED_TITLE, report.quality_table(comparison.calibrated))]
    if comparison.finetuned:
        finetuned = report.quality_table(report.with_finetuned_original(comparison.finetuned))
        tables.append((report.finetuned_title(comparison), finetuned))
    tables.append(("Time and memory, batch size 1", report.cost_table(comparison)))
    if len(curve := report.curve_table(comparison)) > 1:
        tables.append((report.CURVE_TITLE, curve))
    for title, (header, *rows) in tables:
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(header):
            table.add_column(column, justify="right" if number else "left", no_wrap=not number, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    heads = ", ".join(map(str, comparison.softmax_heads)) or "none"
    conversion = comparison.settings.conversion
    console.print(
        f"Window {conversion.window}: a query sees {seen_exactly(conversion.window, conversion.sink_tokens)} exactly. "
        f"Exact heads (layer, key head): {heads}, of {comparison.key_heads}. {comparison.seconds:.0f} s in all."
    )


def main() -> None:
    """Runs the command line; errors are printed as one paragraph, with exit status 1."""
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    try:
        app()
    except (RFAError, FloatingPointError, ImportError, OSError, ValueError) as error:
        message = str(error)
        if isinstance(error, ImportError) and "pip install" not in message:
            message += ". Install what is missing, for example with `pip install 'hf_rfa[train]'`."
        Console(stderr=True).print(f"[bold red]Error:[/bold red] {escape(message)}", soft_wrap=True)
        sys.exit(1)
