"""What a converted model diverges by on a few texts, measured: the judge of what costs only estimate."""

from transformers import PreTrainedModel

from hf_rfa.calibration.divergence import Divergence
from hf_rfa.calibration.outputs import OutputReader, Outputs
from hf_rfa.calibration.processes import sum_over_processes
from hf_rfa.calibration.progress import Progress
from hf_rfa.calibration.texts import Text
from hf_rfa.runtime.quiet import quiet_eval


class Measurement:
    """Runs a model, as it is set now, on texts whose outputs by the original are known.

    Attributes:
        texts: The texts.
    """

    def __init__(self, base: PreTrainedModel, measured: list[tuple[Text, Outputs]], progress: Progress) -> None:
        self.texts = [text for text, _ in measured]
        self._base, self._measured, self._progress = base, measured, progress
        self._reader = OutputReader(base)

    def __call__(self) -> Divergence:
        """The divergence; the sums of all processes are added."""
        found = Divergence()
        with quiet_eval(self._base):
            for text, original in self._measured:
                found.add(original, self._reader(text.inputs))
                self._progress.done(text.tokens)
        found.merge(sum_over_processes)
        return found
