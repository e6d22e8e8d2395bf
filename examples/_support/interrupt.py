"""Ctrl-C as a question that a loop asks between two steps, so that no step is cut in half."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupt:
    """While the context lasts, the first SIGINT or SIGTERM only sets ``asked``; a second SIGINT raises at once.

    Args:
        patient: no SIGINT raises, since torchrun passes on the one that the terminal has sent already.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, patient: bool = False) -> None:
        self.asked = False
        self.patient = patient

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt
        self.asked = True
