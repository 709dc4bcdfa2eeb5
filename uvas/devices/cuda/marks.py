"""How far a stream has come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import index
from typing import TYPE_CHECKING, Any

from uvas.devices.cuda import driver
from uvas.devices.cuda.undo import Undo
from uvas.errors import DeviceError, DeviceLostError, NotSupportedError, ReleasedError

if TYPE_CHECKING:
    from uvas.devices.cuda.card import Card

__all__ = ["Mark", "card_of", "stream_pointer"]

_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING


def stream_pointer(stream: object) -> int:
    """Return the driver's handle of a stream: of CuPy's, of one with ``__cuda_stream__``, or of a plain number.

    Raises
    ------
    TypeError
        It is none of these.
    """
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    try:
        return index(getattr(stream, "ptr", stream))  # type: ignore[arg-type]  # this is the check
    except TypeError:
        raise TypeError(f"{stream!r} is no CUDA stream") from None


def card_of(cards: Sequence[Card], stream: object) -> Card:
    """Return which of the cards a stream is of; the default one: of the card that is the thread's current one.

    Raises
    ------
    TypeError
        It is no stream.
    """
    if len(cards) > 1:
        with suppress(DeviceError):  # no card is current, say
            context = int(driver.call("cuStreamGetCtx", stream_pointer(stream)))
            return next((card for card in cards if card.context == context), cards[0])
    return cards[0]


class Mark:
    """What is queued on a stream now, to be waited for. Nothing is, on a card that is gone.

    Raises
    ------
    NotSupportedError
        The stream is being captured: it runs nothing that could be waited for.
    DeviceError
        The driver said no.
    """

    def __init__(self, card: Card, stream: object) -> None:
        self._card = card
        self._event: Any = None
        pointer = stream_pointer(stream)
        self.lane = card, pointer
        """Where it is: while one is not passed, later ones there are not either."""
        with suppress(DeviceLostError):  # noted; it runs nothing any more
            if not card.lost:
                self._event = self._record(pointer)

    def _record(self, pointer: int) -> Any:
        card = self._card
        with card.current(), Undo() as undo:
            if card.captures(pointer):
                raise NotSupportedError(
                    "an order after a stream",
                    "it is being captured, and runs nothing meanwhile",
                    "end the capture first",
                )
            event = card.call("cuEventCreate", _NO_TIMING)
            undo.push(lambda: card.call("cuEventDestroy", event))
            card.call("cuEventRecord", event, pointer)
        return event

    def passed(self, *, wait: bool = False) -> bool:
        """Whether all of it has run. A card that is gone runs nothing; where no call may be made, nothing is known.

        Raises
        ------
        DeviceError
            The driver said no.
        """
        if self._event is None:
            return True
        if not driver.usable():
            return False
        try:
            with self._card.current():  # to ask in another way would end a capture
                self._card.call("cuEventSynchronize" if wait else "cuEventQuery", self._event)
        except DeviceError as error:
            if error.name == "CUDA_ERROR_NOT_READY":
                return False
            if not self._card.lost:
                raise
        self.drop()
        return True

    def drop(self) -> None:
        """Ask no more."""
        if self._event is not None:
            with suppress(DeviceError, ReleasedError):
                self._card.call("cuEventDestroy", self._event)
            self._event = None
