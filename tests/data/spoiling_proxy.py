"""A TCP proxy that spoils connections: `spoiling_proxy.py LISTEN TARGET AFTER_BYTES CONNECTIONS cut|stall`."""

import asyncio
import sys


async def main(listen: int, target: int, after: int, connections: int, how: str) -> None:
    spoiled = 0

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal spoiled
        request = await reader.read(1 << 16)
        if not request:  # somebody looks whether the proxy is up
            writer.close()
            return
        from_server, to_server = await asyncio.open_connection("127.0.0.1", target)
        to_server.write(request)
        forward = asyncio.create_task(copy(reader, to_server))
        left = 1 << 60
        if spoiled < connections:
            spoiled, left = spoiled + 1, after
        try:
            while left and (data := await from_server.read(min(1 << 16, left))):
                writer.write(data)
                await writer.drain()
                left -= len(data)
            if not left and how == "stall":
                await asyncio.sleep(3600)
        finally:
            forward.cancel()
            to_server.close()
            writer.close() if left else writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", listen)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:5]), sys.argv[5]))
