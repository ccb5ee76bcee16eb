import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clip_train import fetch as fetch_module
from clip_train.fetch import FetchConfig, FetchError, fetch, is_public, resolve
from clip_train.settings import UserError

HERE = FetchConfig(allow_private=True, retries=2, backoff=0.0, timeout=5.0, max_bytes=1000)


class Server:
    """A web server of one's own; answers[path] is (status, headers, body) or a function of the handler."""

    def __init__(self):
        self.answers, self.asked = {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, dict(self.headers)))
                answer = outer.answers[self.path.partition("?")[0]]
                if callable(answer):
                    answer(self)
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def refused(url, config=HERE):
    with pytest.raises(FetchError) as caught:
        fetch(url, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::1]",
        "169.254.169.254",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",  # carrier-grade NAT
        "100.100.100.200",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.0.8",
        "168.63.129.16",
        "2130706433",  # 127.0.0.1 as one number
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "0",
        "１２７.0.0.1",  # digits that IDNA folds
        "localhost",
        "[::]",
        "[fe80::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[ff02::1]",
        "[::127.0.0.1]",
        "[::ffff:10.0.0.1]",
        "[::ffff:7f00:1]",
        "[::ffff:0:127.0.0.1]",
        "[64:ff9b::10.0.0.1]",
        "[64:ff9b:1::10.0.0.1]",
        "[2002:7f00:1::]",
        "[2001:0:7f00:1::]",
        "[2001:db8::1]",
    ],
)
def test_what_is_not_public_is_never_connected_to(host, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    why = refused(f"http://{host}:80/latest/meta-data", FetchConfig(retries=0))
    assert "is not public" in why or "host is not known" in why  # a machine without IPv6 does not know such a host


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),  # how a network without IPv4 reaches it (RFC 6052)
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::8.8.8.8", False),
        ("::8.8.8.8", False),
        ("2002:808:808::", False),
        ("fe80::1%eth0", False),
        ("192.88.99.1", False),
        ("240.0.0.1", False),
        ("nonsense", False),
    ],
)
def test_an_address_is_public_whatever_it_is_written_as(address, public):
    assert is_public(address) is public


def test_a_name_is_resolved_once_and_the_address_that_was_checked_is_connected_to(monkeypatch):
    answers = [["93.184.215.14"], ["127.0.0.1"]]  # a name that turns private after the check (DNS rebinding)

    def getaddrinfo(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    connected = []

    def connect(self, address):
        connected.append(address)
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert "refused" in refused("http://rebound.example/x.png", FetchConfig(retries=0))
    assert connected == [("93.184.215.14", 80)] and answers == [["127.0.0.1"]]
    answers[:] = [["93.184.215.14", "10.0.0.1"]]  # public and private at once
    with pytest.raises(FetchError, match="half.example is not public \\(10.0.0.1\\)"):
        resolve("half.example", 80)


def test_a_redirect_to_a_private_address_is_refused(server, monkeypatch):
    server.answers["/x"] = (302, {"Location": "http://169.254.169.254/latest"}, b"")
    public = fetch_module.is_public
    monkeypatch.setattr(fetch_module, "is_public", lambda address: address == "127.0.0.1" or public(address))
    assert refused(f"{server.root}/x", FetchConfig(retries=0)) == "169.254.169.254 is not public (169.254.169.254)"
    server.answers["/x"] = (302, {"Location": "file:///etc/passwd"}, b"")
    assert "only http and https" in refused(f"{server.root}/x", FetchConfig(retries=0))


@pytest.mark.parametrize(
    "url, why",
    [
        ("ftp://example.org/x.png", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("//example.org/x.png", "only http and https"),
        ("http:///x.png", "without a host"),
        ("http://user:secret@example.org/x.png", "user name"),
        ("http://[::1/x.png", "not an address"),
        ("http://127.0.0.1:99999/x.png", "not an address"),
        ("http://127.0.0.1\r\nX-Evil: 1/x.png", "not an address"),
    ],
)
def test_what_is_no_web_address_is_refused(url, why):
    assert why in refused(url)


def test_a_picture_is_fetched_with_a_name_and_through_redirects(server):
    server.answers["/ä b.png"] = server.answers["/%C3%A4%20b.png"] = (200, {}, b"picture")
    server.answers["/one"] = (301, {"Location": "/two?q=1"}, b"")
    server.answers["/two"] = (307, {"Location": f"{server.root}/ä b.png".encode().decode("latin-1")}, b"")
    assert fetch(f"{server.root}/one", HERE) == b"picture"
    assert [path for path, _ in server.asked] == ["/one", "/two?q=1", "/%C3%A4%20b.png"]
    headers = server.asked[0][1]
    assert headers["User-Agent"].startswith("unclip/") and headers["Host"] == server.root.removeprefix("http://")
    assert fetch(f"{server.root}/ä b.png", FetchConfig(allow_private=True, user_agent="me")) == b"picture"
    assert server.asked[-1][1]["User-Agent"] == "me"


def test_redirects_in_a_circle_end(server):
    server.answers["/x"] = (302, {"Location": "/x"}, b"")
    assert refused(f"{server.root}/x") == "more than 5 redirects"
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    "answer, why",
    [
        ((404, {}, b"no"), "HTTP 404"),
        ((200, {}, b""), "an empty answer"),
        ((200, {"X-Robots-Tag": "somebot: noai, nofollow"}, b"x"), "noai"),
        ((200, {}, b"x" * 1001), "more than 0.001 MB"),
        ((204, {}, b""), "HTTP 204"),
    ],
)
def test_answers_without_a_picture_to_use_are_refused_at_once(server, answer, why):
    server.answers["/x"] = answer
    assert why in refused(f"{server.root}/x")
    assert len(server.asked) == 1


def test_a_body_of_unknown_length_is_read_no_further_than_the_bound(server):
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(100_000):
                handler.wfile.write(b"x" * 1000)
                sent.append(1000)
        except OSError:
            pass

    server.answers["/x"] = endless
    assert "more than 0.001 MB" in refused(f"{server.root}/x")
    time.sleep(0.05)
    assert sum(sent) < 50_000_000  # what the kernel's buffers took, not all


def test_what_may_pass_is_tried_again_and_a_server_may_say_when(server, monkeypatch):
    statuses = [503, 429, 200]
    waits = []

    def changing(handler):
        handler.send_response(status := statuses.pop(0))
        if status == 429:
            handler.send_header("Retry-After", "7")
        handler.end_headers()
        handler.wfile.write(b"picture")

    class Clock(threading.Event):
        def wait(self, seconds):
            waits.append(seconds)
            return False

    server.answers["/x"] = changing
    config = FetchConfig(allow_private=True, retries=2, backoff=0.25)
    assert fetch(f"{server.root}/x", config, Clock()) == b"picture" and waits == [0.25, 7.0]
    statuses[:] = [503] * 3
    assert refused(f"{server.root}/x") == "HTTP 503" and statuses == []
    stopped = threading.Event()
    stopped.set()
    statuses[:] = [503] * 3
    with pytest.raises(FetchError, match="stopped"):
        fetch(f"{server.root}/x", HERE, stopped)
    assert len(statuses) == 2


def test_a_body_that_ends_too_early_is_tried_again(server):
    server.answers["/x"] = (200, {"Content-Length": "100"}, b"half")
    assert refused(f"{server.root}/x") == "cut short" and len(server.asked) == 3


def test_a_server_that_sends_a_byte_now_and_then_does_not_hold_a_thread(server):
    def slow(handler):
        try:
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-")
            for _ in range(100):
                time.sleep(0.05)
                handler.wfile.write(b"a")
                handler.wfile.flush()
        except OSError:
            pass

    server.answers["/x"] = slow
    began = time.monotonic()
    assert refused(f"{server.root}/x", FetchConfig(allow_private=True, timeout=0.3, retries=0)) == "no answer in 0.3 s"
    assert time.monotonic() - began < 1.5


def test_no_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.answers["/x"] = (200, {}, b"picture")
    assert fetch(f"{server.root}/x", HERE) == b"picture"


def test_a_certificate_that_is_not_valid_is_not_waved_through(monkeypatch):
    def handshake(*_):
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = "self-signed certificate"
        raise error

    monkeypatch.setattr(fetch_module, "_get", handshake)
    assert refused("https://example.org/x.png") == "its certificate is not valid: self-signed certificate"
    assert fetch_module._tls().verify_mode == ssl.CERT_REQUIRED and fetch_module._tls().check_hostname


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="positive"):
        FetchConfig(timeout=0)
