"""Addresses that lead inside, in all the ways that they can be written."""

import contextlib
import ipaddress
import random
import socket
from collections.abc import Iterator

INNER = ("127.0.0.1", "127.8.9.1", "10.1.2.3", "172.16.0.9", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0")
INNER += ("192.0.0.8", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "192.0.2.1")
INNER6 = ("::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "100::1", "fec0::1", "5f00::1")
PUBLIC = "93.184.215.14"


def inner(rng: random.Random) -> str:
    """An inner IPv4 or IPv6 address, as a host stands in an address."""
    ip = ipaddress.IPv4Address(rng.choice(INNER))
    number, bytes_ = int(ip), ip.packed
    high, low = number >> 16, number & 0xFFFF
    return rng.choice(
        (
            str(ip),
            f"{ip}.",
            str(number),
            hex(number),
            f"0{number:o}",
            ".".join(hex(one) for one in bytes_),
            ".".join(f"0{one:o}" for one in bytes_),
            ".".join(f"{one:04o}" for one in bytes_),
            f"{bytes_[0]}.{number & 0xFFFFFF}",
            f"{bytes_[0]}.{bytes_[1]}.{low}",
            f"0x{bytes_[0]:x}.{bytes_[1]}.0{bytes_[2]:o}.{bytes_[3]}",
            str(ip).translate({ord("0") + n: 0xFF10 + n for n in range(10)}),  # full width, which IDNA folds
            str(ip).replace(".", "\u3002"),
            "".join(f"%{ord(one):02x}" for one in str(ip)),
            f"[::ffff:{ip}]",
            f"[::ffff:{high:x}:{low:x}]",
            f"[0:0:0:0:0:ffff:{high:x}:{low:x}]",
            f"[::{ip}]",
            f"[::ffff:0:{ip}]",
            f"[64:ff9b::{ip}]",
            f"[64:ff9b:1::{ip}]",
            f"[2002:{high:x}:{low:x}::1]",
            f"[2001:0:{high:x}:{low:x}::1]",
            f"[{rng.choice(INNER6)}]",
            f"[{rng.choice(INNER6)}%25lo]",
            "localhost",
            "LOCALHOST.",
            "inner.test",  # the resolver's: see resolver()
            "both.test",
            "six.test",
            "mapped.test",
        )
    )


def address(rng: random.Random) -> str:
    """An address that must not be fetched."""
    host = inner(rng)
    port = rng.choice(("", "", ":80", ":8000", ":22", ":", ":0", ":99999"))
    path = rng.choice(("/", "/a.png", "", "/latest/meta-data/", "?x", "#a"))
    scheme = rng.choice(("http", "https", "HTTP", "hTTps"))
    other = ("file", "gopher", "ftp", "dict", "ldap", "data", "jar", "javascript", "ws", "unix", "http+unix", "")
    return rng.choice(
        (
            f"{scheme}://{host}{port}{path}",
            f"{scheme}://{host}{port}{path}",
            f"{scheme}://{host}{port}{path}",
            f"{scheme}://{PUBLIC}@{host}{port}{path}",
            f"{scheme}://{PUBLIC}:80@{host}{port}{path}",
            f"{scheme}://{host}#@{PUBLIC}{path}",
            f"{scheme}://{host}\\@{PUBLIC}{path}",
            f"{scheme}://{PUBLIC}\\@{host}{path}",
            f"{scheme}:///{host}{path}",
            f"{scheme}:{host}{path}",
            f" {scheme}://{host}{path}",
            f"{scheme}:/\t/{host}{path}",
            f"{scheme}://\n{host}{path}",
            f"{scheme}://{host}\r\nHost: {PUBLIC}{path}",
            f"//{host}{path}",
            f"{rng.choice(other)}://{host}{path}",
            "file:///etc/passwd",
            "file://localhost/etc/passwd",
            "gopher://127.0.0.1:6379/_FLUSHALL",
            "data:image/png;base64,AAAA",
            "/etc/passwd",
            "",
        )
    )


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """A resolver that knows some names, and no connections: the list fills with the addresses that one was tried to."""
    real_lookup, real_connect, tried = socket.getaddrinfo, socket.socket.connect, []
    names = {"inner.test": ["10.0.0.1"], "both.test": [PUBLIC, "192.168.0.1"], "six.test": ["fd00::1"]}
    names |= {"mapped.test": ["::ffff:127.0.0.1"], "public.test": [PUBLIC]}

    def lookup(host, port, *rest, **how):
        host = host.decode() if isinstance(host, bytes) else host
        found = names.get((host or "").lower())
        if found is None:
            how["flags"] = how.get("flags", 0) | (
                0 if (host or "").lower().strip(".") == "localhost" else socket.AI_NUMERICHOST
            )
            return real_lookup(host, port, *rest, **how)
        families = [socket.AF_INET6 if ":" in one else socket.AF_INET for one in found]
        kind = (socket.SOCK_STREAM, 6, "")
        return [(family, *kind, (one, port)) for family, one in zip(families, found, strict=True)]

    def connect(self, to):
        tried.append(str(to[0]) if isinstance(to, tuple) else str(to))
        raise ConnectionRefusedError(111, "nobody connects here")

    socket.getaddrinfo, socket.socket.connect = lookup, connect
    try:
        yield tried
    finally:
        socket.getaddrinfo, socket.socket.connect = real_lookup, real_connect
