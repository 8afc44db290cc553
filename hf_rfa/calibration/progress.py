"""A progress bar over the stages of a conversion, whose time left is right because its units are seconds of work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Work done, in units that take about the same time each; the bar names the stage.

    Example:
        >>> with progress_bar(False) as bar:
        ...     bar.stage("fitting", 10)
        ...     bar.done(10)
    """

    def __init__(self, bar: "tqdm | None") -> None:
        self._bar = bar

    def expect(self, units: float) -> None:
        """Say how much work is to come."""
        if self._bar is not None:
            self._bar.total = (self._bar.total or 0) + units
            self._bar.refresh()

    def stage(self, name: str, units: float = 0) -> None:
        """Begin a stage; units: work that nobody has expected yet."""
        if self._bar is not None:
            self._bar.set_description(name)
        self.expect(units)

    def done(self, units: float) -> None:
        """Note work that is done."""
        if self._bar is not None:
            self._bar.update(units)


@contextmanager
def progress_bar(shown: bool | None) -> Iterator[Progress]:
    """A bar for the block; None: shown if stderr is a terminal."""
    if shown is False or (shown is None and not sys.stderr.isatty()):
        yield Progress(None)
        return
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} < {remaining}"
    bar = tqdm(total=0, leave=False, bar_format=layout)
    try:
        yield Progress(bar)
    finally:
        bar.close()
