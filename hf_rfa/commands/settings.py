"""Options of `hf-rfa convert`, `hf-rfa chat` and `hf-rfa doctor`."""

from dataclasses import dataclass
from typing import Literal

from hf_rfa.config import RFAConfig
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.options import Settings, option, part
from hf_rfa.runtime.devices import DEVICE_HELP

_CALIBRATION, _RUN, _LAYER = "Calibration", "Run", "Layer"
DType = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPE_HELP = "Precision of the weights; 'auto': as they were saved."


@dataclass(frozen=True)
class ConvertSettings(Settings):
    """Settings of `convert_folder`, and the options of `hf-rfa convert`."""

    model: str = option("Folder or hub id of the model to convert.")
    output: str = option("Folder for the converted model and its tokenizer; new, or empty.")
    save_pattern: str | None = option(
        "File for the choice of heads, which `--pattern` applies to another copy of the model.", None
    )
    conversion: RFAConfig = part(RFAConfig(softmax_heads="auto"), group="Conversion")
    pattern: str | None = option(
        "File of `--save-pattern`: its exact heads and numbers of kept keys are taken, and no head is ranked.", None,
        group="Conversion",
    )  # fmt: skip
    data: str | None = option(
        f"Texts to calibrate on. {SOURCE_HELP} By default a text that the model writes itself.", None,
        group=_CALIBRATION,
    )  # fmt: skip
    context: int = option("Tokens per text of `data`.", 1024, group=_CALIBRATION, least=2)
    calibration_batches: int = option("Batches of `data`.", 2, group=_CALIBRATION, least=1)
    batch_size: int = option("Texts per batch.", 2, group=_CALIBRATION, least=1)
    text_column: str = option("Column of the text in .jsonl, .parquet and hub datasets.", "text", group=_CALIBRATION)
    dtype: DType = option(_DTYPE_HELP, "auto", group=_RUN)
    device: str = option(DEVICE_HELP, "auto", group=_RUN)
    trust_remote_code: bool = option("Run code that lies beside the weights; read it first.", False, group=_RUN)


@dataclass(frozen=True)
class ChatSettings(Settings):
    """Settings of `chat`, and the options of `hf-rfa chat`."""

    folder: str = option("Folder or hub id of a chat model, converted or not.")
    system: str | None = option("What the model is told before the conversation; by default nothing.", None)
    max_new_tokens: int = option("The most tokens of an answer.", 512, least=1)
    greedy: bool = option("The likeliest token each time; by default as the model's generation settings say.", False)
    dtype: DType = option(_DTYPE_HELP, "auto", group=_RUN)
    device: str = option(DEVICE_HELP, "auto", group=_RUN)
    trust_remote_code: bool = option("Run code that lies beside the weights; read it first.", False, group=_RUN)


@dataclass(frozen=True)
class DoctorSettings(Settings):
    """Settings of `examine`, and the options of `hf-rfa doctor`."""

    device: str = option(DEVICE_HELP, "auto", group=_RUN)
    dtype: DType = option("Of the tokens; 'auto': bfloat16 on a GPU, else float32.", "auto", group=_RUN)
    heads: int = option("Query heads, each with a key head.", 8, group=_LAYER, least=1)
    head_dim: int = option("Numbers per head.", 64, group=_LAYER, least=1)
    num_features: int = option("Random features per head.", 64, group=_LAYER, least=1)
    window: int = option("Chunk size, tokens.", 64, group=_LAYER, least=1)
    kept_keys: int = option("Far keys per head that stay exact, in one of two layers.", 128, group=_LAYER, least=1)
    length: int = option("Tokens of the calls that are timed.", 4096, group=_LAYER, least=2)
