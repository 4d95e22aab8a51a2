"""The front end's process: it listens before the ranks are ready, and says how it ended by its exit code.

0 after a drain; 1 when a rank was lost, unless it outlives its engine: then it waits for another one.
Knows signals and the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import uvicorn

from megatron_sps2.engine.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from megatron_sps2.parallel import garbage
from megatron_sps2.server.app import make_app
from megatron_sps2.server.engine_client import EngineClient
from megatron_sps2.server.errors import ApiError
from megatron_sps2.server.front_end_config import FrontEndConfig
from megatron_sps2.server.metrics import Metrics
from megatron_sps2.server.service import Service

logger = logging.getLogger(__name__)

DRAINED, LOST = 0, 1
# For responses to get out before the process ends.
FLUSH_S = 1.0
LOOK_S = 0.05
# SLURM signals every process of a step, and rank 0 passes on its own signal: one wish, heard twice.
ONE_SIGNAL_S = 3.0
BACKLOG = 1024


class _Server(uvicorn.Server):
    """Signals are ours: the first one drains."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(config: FrontEndConfig) -> int:
    """Serves until SIGTERM or until a rank is lost -> exit code. Raises OSError for a port that is taken."""
    try:
        return asyncio.run(_FrontEnd(config).run())
    finally:
        for path in map(Path, config.leftovers):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


class _FrontEnd:
    def __init__(self, config: FrontEndConfig) -> None:
        self._config = config
        self._signals = 0
        self._heard_at = -ONE_SIGNAL_S
        self._signalled = asyncio.Event()
        self._metrics = Metrics(config.served_model_name)

    async def run(self) -> int:
        config, loop = self._config, asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)
        listener = _listen(config)
        client = EngineClient(config, self._metrics)
        service = Service(
            config=config, client=client, metrics=self._metrics, tokenizer=_load_tokenizer(config.checkpoint)
        )
        settings = uvicorn.Config(
            make_app(service), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2
        )
        server = _Server(settings)
        garbage.leave_aside()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reading = asyncio.create_task(client.run())
        _tell_port(config, listener)
        code = await self._until_end(client, reading)
        server.should_exit = True
        await asyncio.wait({serving}, timeout=2 * FLUSH_S + 1)
        reading.cancel()
        return code

    def _on_signal(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._heard_at < ONE_SIGNAL_S:
            return
        self._heard_at = now
        self._signals += 1
        self._signalled.set()

    async def _until_end(self, client: EngineClient, reading: asyncio.Task[None]) -> int:
        while True:
            await self._until_news(client, reading)
            if not client.lost.is_set():
                code = await self._drain(client)
                if code == DRAINED:
                    return code
            if not self._config.outlives_engine:
                logger.error("%s; every request has been told", client.lost_message)
                await asyncio.sleep(FLUSH_S)
                return LOST
            logger.error("%s; every request has been told; the engine may come again", client.lost_message)
            while client.lost.is_set():
                if self._signals:
                    return DRAINED
                if not self._keeper_lives():
                    return LOST
                await asyncio.sleep(LOOK_S)

    async def _until_news(self, client: EngineClient, reading: asyncio.Task[None]) -> None:
        """A loss or a signal. Raises what ended `reading`."""
        lost = asyncio.create_task(client.lost.wait())
        signalled = asyncio.create_task(self._signalled.wait())
        while not (lost.done() or signalled.done() or reading.done()):
            await asyncio.wait({lost, signalled, reading}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            if client.state == "starting" and not self._keeper_lives():
                client.lose("the ranks ended before the model was loaded")
        if reading.done() and not client.lost.is_set():
            reading.result()
        for task in (lost, signalled):
            task.cancel()

    def _keeper_lives(self) -> bool:
        """Whether there is somebody who starts the engine, or starts it again, as far as is known."""
        if self._config.keeper_pid is None:
            return True
        try:
            return psutil.Process(self._config.keeper_pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    async def _drain(self, client: EngineClient) -> int:
        """What runs may finish; then the ranks are sent home."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        end = begin + self._config.drain_timeout_s
        while client.state == "starting" and loop.time() < end and self._signals < 2:
            await asyncio.sleep(LOOK_S)  # Ranks that load hear nothing yet.
        if client.state == "starting":
            client.lose("the model was still being loaded when the time for draining was over")
        if client.state != "serving":
            return LOST
        client.state = "draining"
        while client.streams and loop.time() < end and self._signals < 2:
            if client.lost.is_set():
                return LOST
            await asyncio.sleep(LOOK_S)
        waited = f"was still running after {loop.time() - begin:.1f} s of draining"
        leftovers = dict(client.streams)
        for stream in leftovers.values():
            stream.news.put_nowait(
                ApiError(503, f"the server is shutting down; this request {waited}", retry_after_s=5)
            )
        while client.streams and loop.time() < end + FLUSH_S:
            await asyncio.sleep(LOOK_S)
        await client.stop()
        return DRAINED


def _listen(config: FrontEndConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}); choose another --port"
        ) from error
    listener.listen(BACKLOG)
    return listener


def _tell_port(config: FrontEndConfig, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    logger.info("listening on http://%s:%d", config.host, port)
    if config.port_file:
        beside = Path(f"{config.port_file}.{os.getpid()}")
        beside.write_text(str(port))
        beside.rename(config.port_file)


def _load_tokenizer(checkpoint: str) -> Tokenizer | None:
    """None for a checkpoint without one, which is served on token ids alone."""
    if not (Path(checkpoint) / TOKENIZER_FILE).is_file():
        return None
    return load_tokenizer(checkpoint)
