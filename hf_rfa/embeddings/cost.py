"""What encoding one long text costs, in time and memory, by softmax and converted, each in a process of its own.

Memory is the growth of the resident set while the text is encoded: Linux only, read from /proc/self/status.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_rfa.config import RFAConfig
from hf_rfa.conversion.conversion import convert
from hf_rfa.embeddings.encoders import long_encoder

#: A text of so many tokens warms the encoder up, before memory is looked at.
WARM_UP = 300
#: The text is read so many times after the first, whose time is also that of getting memory from the system.
TIMED = 2


@dataclass(frozen=True)
class EncodingCost:
    """Of one text.

    Attributes:
        seconds: CPU time, the least of `TIMED` readings.
        peak_bytes: Memory at most while it is read for the first time, above what the encoder takes.
    """

    tokens: int
    seconds: float
    peak_bytes: int


def encoding_cost(tokens: int, config: RFAConfig | None, *, local: bool = False) -> EncodingCost:
    """Cost of a text of `tokens` in `long_encoder`, converted by `config` (not calibrated); None: by softmax."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, tokens, config, local, torch.get_num_threads()).result()


def _measure(tokens: int, config: RFAConfig | None, local: bool, threads: int) -> EncodingCost:
    torch.set_num_threads(threads)
    encoder = long_encoder(local=local, context=max(8192, tokens))
    if config is not None:
        convert(encoder, config, calibrate=False)
    ids = torch.randint(5, encoder.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoder(input_ids=ids[:, :WARM_UP])
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident("VmRSS")
        encoder(input_ids=ids)
        peak = _resident("VmHWM") - before
        seconds = []
        for _ in range(TIMED):
            started = time.process_time()
            encoder(input_ids=ids)
            seconds.append(time.process_time() - started)
    return EncodingCost(tokens, min(seconds), peak)


def _resident(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
