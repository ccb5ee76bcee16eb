"""Connection: uvicorn's, but one that is open and asks for nothing is not kept for ever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

REQUEST_SECONDS = 10.0  # for the head of a request, from the connection's start or from the head's first byte


class Connection(AutoHTTPProtocol):
    """Closed if it has not brought the whole head of a request in time; uvicorn would wait, and its places run out.

    The Door bounds the time of a body, and uvicorn that between an answer and the next request.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._stop_watching()

    @property
    def _asks_nothing(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self._asks_nothing:
            self._stop_watching()
        elif self._patience is None:
            self._patience = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _stop_watching(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if self._asks_nothing:
            self.transport.close()
