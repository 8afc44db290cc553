"""The options of `hf-rfa serve`."""

from dataclasses import dataclass
from typing import Literal

from hf_rfa.options import Settings, option
from hf_rfa.runtime.devices import DEVICE_HELP

_LIMITS, _RUN = "Limits", "Run"


@dataclass(frozen=True)
class ServeSettings(Settings):
    """Settings of `serve`, and the options of `hf-rfa serve`."""

    folder: str = option("Folder or hub id of a causal LM with its tokenizer, converted or not.")
    host: str = option("Address to listen on; 0.0.0.0 for all of the machine's.", "127.0.0.1")
    port: int = option("Port to listen on.", 8000, least=1, most=65535)
    name: str | None = option("The model's name in the API; by default the folder's.", None)
    max_batch: int = option("Requests that are answered at the same time.", 32, group=_LIMITS, least=1)
    max_waiting: int = option("Requests that may wait; more are refused with status 429.", 128, group=_LIMITS, least=0)
    max_length: int | None = option(
        "Tokens of a prompt and its answer together; by default as many as the model has positions.", None,
        group=_LIMITS, least=2,
    )  # fmt: skip
    prefill_tokens: int = option(
        "Tokens of new prompts that are read between two steps of the running requests.", 512, group=_LIMITS, least=1
    )
    drain_seconds: int = option(
        "After SIGTERM or Ctrl-C, seconds in which running requests may end.", 60, group=_LIMITS, least=0
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Of the weights; 'auto' is what they were saved in.", "auto", group=_RUN
    )
    device: str = option(DEVICE_HELP, "auto", group=_RUN)
    trust_remote_code: bool = option("Run code that lies beside the weights; read it first.", False, group=_RUN)
    threads: int | None = option("CPU threads; by default PyTorch's number.", None, group=_RUN, least=1)
