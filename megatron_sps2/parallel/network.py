"""Addresses and network cards of this host. Knows the operating system, no ranks."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

import psutil

DISCARD_PORT = 9


def address_of(name: str) -> str:
    """What this host takes `name` to be: an IP address. Raises OSError where it knows no such name."""
    return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def card_towards(name: str) -> str | None:
    """The card by which this host reaches `name`, or its only one with an IPv4 address; None if unclear.

    gloo takes that of the host's own name, which may stand for a loopback address, or for none.
    """
    cards = _cards()
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((name, DISCARD_PORT))  # UDP: nothing is sent
        if (own := probe.getsockname()[0]) in cards:
            return cards[own]
    return next(iter(cards.values())) if len(set(cards.values())) == 1 else None


def _cards() -> dict[str, str]:
    """IPv4 address -> card, loopback left out."""
    return {
        each.address: card
        for card, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if each.family == socket.AF_INET and not is_loopback(each.address)
    }
