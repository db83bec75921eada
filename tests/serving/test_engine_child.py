"""The connection to an engine's process."""

import asyncio

from jaxserve.serving.engine_child import EngineChild
from jaxserve.serving.wire import FROM_SERVER, Abort, FrameReader


class Transport:
    """What uvloop gives: of no class of asyncio."""

    def __init__(self) -> None:
        self.written = b""

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written += data


def test_messages_go_out_over_the_transports_of_any_loop() -> None:
    async def sent() -> bytes:
        child, transport = EngineChild(lambda message: None), Transport()
        child.connection_made(transport)  # pyright: ignore[reportArgumentType]
        child.send(Abort("one"))
        return transport.written

    assert FrameReader(FROM_SERVER).feed(asyncio.run(sent())) == [Abort("one")]
