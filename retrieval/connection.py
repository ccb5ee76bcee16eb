"""Connection: uvicorn's, but one that asks for nothing, or does not take its answer, is not kept for ever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

REQUEST_SECONDS = 10.0  # for the head of a request, from the connection's start or from the head's first byte
ANSWER_SECONDS = 60.0  # in which a client must take something of what waits for it


class Connection(AutoHTTPProtocol):
    """Closed if it has not brought the whole head of a request in time; uvicorn would wait, and its places run out.

    When all places are taken, the one that has asked for nothing for longest gives way to a new one.
    Cut off if its client takes nothing of an answer for long: else the answer stays in memory, and the server, told to
    stop, waits for it. The Door bounds the time of a body, and uvicorn that between an answer and the next request.
    """

    _patience: asyncio.TimerHandle | None = None
    _delivery: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing() as soon as anything waits for the client
        self._watch()
        if self.limit_concurrency and len(self.connections) >= self.limit_concurrency:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._stop_watching()
        self._delivered()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._deliver()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._delivered()

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

    def _make_room(self) -> None:
        """Cut off whoever has asked for nothing for longest, so that crowds of such shut nobody out."""
        idle = (one for one in self.connections if one is not self and one._patience is not None)
        one = min(idle, key=lambda one: one._patience.when(), default=None)
        if one is None and len(self.connections) > self.limit_concurrency * 9 // 8:
            one = self  # even to be told so would take a file, and there may be none left
        if one is not None:
            self.connections.discard(one)
            one.transport.abort()

    def _deliver(self) -> None:
        """Look again in a while whether less of the answer waits than now."""
        waits = self.transport.get_write_buffer_size()
        self._delivery = self.loop.call_later(ANSWER_SECONDS, self._cut_off_unless_below, waits)

    def _cut_off_unless_below(self, waited: int) -> None:
        if self.transport.get_write_buffer_size() < waited:
            self._deliver()
        else:
            self.transport.abort()

    def _delivered(self) -> None:
        if self._delivery is not None:
            self._delivery.cancel()
            self._delivery = None
