"""Pictures from the web, for `unclip shard --fetch`: guarded, bounded, tried again.

Addresses in a table were written by strangers, so a fetch must not become a way into the network it is made from. Each
host is resolved once, all it resolves to must be public, and the connection goes to the address that was checked, so a
name that changes its mind in between (DNS rebinding) gains nothing. Every redirect goes through the same check. Proxies
of the environment are not used: behind one, nobody could check what is connected to.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from urllib.parse import quote, urljoin, urlsplit

from clip_train.settings import UserError

PORTS = {"http": 80, "https": 443}
AGAIN = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be better a moment later
MOVED = {301, 302, 303, 307, 308}
NOT_ALLOWED = {"noai", "noimageai", "noindex", "noimageindex"}  # X-Robots-Tag that img2dataset heeds, too
LONGEST_WAIT = 60.0  # seconds: a Retry-After beyond it is not waited for
GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # all that IANA gave out for public use
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
REFUSED = [
    ipaddress.ip_network(net)
    for net in (
        "2001::/23",  # special purposes, Teredo among them
        "2002::/16",  # 6to4: another way to write an IPv4 address
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.0.0.0/24",  # the IETF's own; Python 3.11 knows only some of it as special
        "168.63.129.16/32",  # Azure's host, an inner address in the public range
    )
]


class FetchError(ValueError):
    """This address gives no picture; the message says why in a few words."""


class HostError(FetchError):
    """Its host is unknown or not a public one; the message says which, and so what names there are inside."""


class _Again(FetchError):
    """It may work in a moment: in `wait` seconds, if the server said so."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How pictures are fetched."""

    timeout: float = 20.0  # seconds for one try, redirects included; the system's resolver has its own
    retries: int = 2  # further tries after one that failed for a reason that may pass
    backoff: float = 1.0  # seconds before the first further try; doubled for each one after it
    redirects: int = 5  # that are followed
    max_bytes: int = 50_000_000  # of one picture
    allow_private: bool = False  # fetch from private and local addresses, too: for a table of your own
    user_agent: str = ""  # by default unclip/VERSION

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.retries < 0 or self.backoff < 0 or self.redirects < 0 or self.max_bytes < 1:
            raise UserError(f"fetching cannot work with {self}: all must be positive")


def fetch(url: str, config: FetchConfig, stopped: threading.Event | None = None) -> bytes:
    """The contents at an http or https address. FetchError, with the reason, if there are none to be had.

    stopped: once it is set, nothing is tried again.
    """
    stopped = stopped or threading.Event()
    for attempt in range(config.retries + 1):
        try:
            return _fetch_once(url, config)
        except _Again as error:
            wait = config.backoff * 2**attempt if error.wait is None else error.wait
            if attempt == config.retries or wait > LONGEST_WAIT:
                raise FetchError(str(error)) from error
            if stopped.wait(wait):
                raise FetchError("stopped") from error
    raise AssertionError("the loop returns or raises")


def _fetch_once(url: str, config: FetchConfig) -> bytes:
    deadline = time.monotonic() + config.timeout
    for _ in range(config.redirects + 1):
        try:
            answer = _get(url, config, deadline)
        except FetchError:
            raise
        except ssl.SSLCertVerificationError as error:  # a ValueError, too
            raise FetchError(f"its certificate is not valid: {error.verify_message}") from error
        except ValueError as error:  # what http.client says of characters that may not be in a request
            raise FetchError("not an address") from error
        except TimeoutError as error:
            raise _Again(f"no answer in {config.timeout:g} s") from error
        except http.client.HTTPException as error:
            raise _Again(f"a broken answer: {type(error).__name__}") from error
        except OSError as error:
            raise _Again(f"no connection: {error.strerror or error}") from error
        if isinstance(answer, bytes):
            return answer
        url = answer
    raise FetchError(f"more than {config.redirects} redirects")


def _get(url: str, config: FetchConfig, deadline: float) -> bytes | str:
    """The contents, or the address of a redirect."""
    scheme, host, port, target = _parts(url)
    sock = _connect(resolve(host, port, config.allow_private), deadline)
    try:
        if scheme == "https":
            sock = _tls().wrap_socket(sock, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = _Timed(sock, deadline)
        connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        name = f"[{host}]" if ":" in host else host
        connection.putheader("Host", name if port == PORTS[scheme] else f"{name}:{port}")
        connection.putheader("User-Agent", config.user_agent or f"unclip/{_version()}")
        connection.putheader("Accept", "image/*")
        connection.putheader("Accept-Encoding", "identity")
        connection.putheader("Connection", "close")
        connection.endheaders()
        response = connection.getresponse()
        where = response.getheader("Location", "")
        if response.status in MOVED and where:
            return urljoin(url, where.encode("latin-1").decode("utf-8", "replace"))  # http.client reads latin-1
        return _body(response, config.max_bytes)
    finally:
        sock.close()


def _connect(addresses: list[tuple[int, tuple]], deadline: float) -> socket.socket:
    """A connection to the first of the addresses that takes one."""
    failed: OSError = OSError("no address")
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(_left(deadline))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failed = error
    raise failed


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status in AGAIN:
        wait = response.getheader("Retry-After", "")
        raise _Again(f"HTTP {response.status}", float(wait) if wait.isdecimal() else None)
    if response.status != 200:
        raise FetchError(f"HTTP {response.status}")
    said = {word.strip().lower() for word in response.getheader("X-Robots-Tag", "").replace(":", ",").split(",")}
    if said & NOT_ALLOWED:
        raise FetchError(f"its site does not allow it (X-Robots-Tag: {min(said & NOT_ALLOWED)})")
    too_large = f"more than {max_bytes / 1e6:g} MB"
    promised = response.length  # None if it comes in chunks
    if (promised or 0) > max_bytes:
        raise FetchError(too_large)
    data = io.BytesIO()
    while chunk := response.read(65536):
        data.write(chunk)
        if data.tell() > max_bytes:
            raise FetchError(too_large)
    if data.tell() < (promised or 0):
        raise _Again("cut short")
    if not data.tell():
        raise FetchError("an empty answer")
    return data.getvalue()


def _parts(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path and query) of an address; FetchError if it is none that may be fetched."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError as error:  # UnicodeError among them
        raise FetchError("not an address") from error
    if parts.scheme not in ("http", "https"):
        raise FetchError(f"{parts.scheme or 'no scheme'}: only http and https are fetched")
    if not host or parts.username is not None:
        raise FetchError("an address without a host or with a user name")
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|")
    return parts.scheme, host, port or PORTS[parts.scheme], target


def resolve(host: str, port: int, allow_private: bool = False) -> list[tuple[int, tuple]]:
    """(family, socket address) of everything a host resolves to.

    FetchError if it resolves to nothing, or (unless allow_private) if any of it is not a public address: a host that is
    public and private at once is up to no good. The system's resolver also understands numbers such as 2130706433,
    0x7f.1 and 0177.0.0.1, so these are seen as what they are.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        kind = _Again if error.errno == socket.EAI_AGAIN else HostError
        raise kind("its host is not known") from error
    except (UnicodeError, ValueError) as error:
        raise FetchError("not an address") from error
    addresses = [(family, address) for family, _, _, _, address in found]
    private = [address[0] for _, address in addresses if not is_public(address[0])]
    if private and not allow_private:
        raise HostError(f"{host} is not public ({private[0]})")
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, in all ways an IPv4 address can be written as IPv6."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6:
        if ip.ipv4_mapped or ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in GLOBAL_V6:
            return False
    if any(ip in net for net in REFUSED if net.version == ip.version):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_private)


class _Timed:
    """A socket whose every wait ends at the deadline: a timeout alone begins anew with each byte of a slow server."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock, self.deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        """http.client writes through this."""
        self.sock.settimeout(_left(self.deadline))
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """http.client reads through this."""
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """http.client closes before it reads the body; _get closes the socket."""


class _Reader(io.RawIOBase):
    def __init__(self, timed: _Timed) -> None:
        self.timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.timed.sock.settimeout(_left(self.timed.deadline))
        return self.timed.sock.recv_into(buffer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("too late")
    return left


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


@cache
def _version() -> str:
    return metadata.version("unclip")
