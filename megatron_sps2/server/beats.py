"""The way to the front end's beats, for ranks and for who watches them. Light: no engine, no torch."""

from __future__ import annotations

import zmq

from megatron_sps2.server.protocol import Lost, encode

LINGER_MS = 500


def connect(endpoint: str) -> zmq.Socket[bytes]:
    """A PUSH socket to the front end's beats."""
    beats: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    beats.linger = LINGER_MS
    beats.ipv6 = True
    beats.connect(endpoint)
    return beats


def tell_lost(endpoint: str, message: str, world: int | None = None) -> None:
    """The world is broken: the front end ends all requests with this line."""
    with connect(endpoint) as beats:
        beats.send(encode(Lost(message=message, world=world)))
