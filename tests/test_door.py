import asyncio
import json

import pytest
from starlette.requests import ClientDisconnect

from retrieval.door import Door, host_of, is_loopback, unless_gone
from retrieval.telemetry import Telemetry

HERE = (b"host", b"127.0.0.1:8000")


async def echo(scope, receive, send):
    """An application that answers with what it was sent, when all of it is there."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(5)
    if scope["path"] == "/bug":
        raise ZeroDivisionError("secret")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


def door(app=echo, **other):
    how = {
        "telemetry": Telemetry(),
        "loopback": True,
        "names": (),
        "token": None,
        "origins": (),
        "free": {"/healthz"},
        "slow": (),
        "route_of": lambda path: path,
        "queue": 2,
        "upload_bytes": 100,
        "all_bytes": 250,
        "seconds": 0.2,
        "slow_seconds": 1,
    }
    return Door(app, **{**how, **other})


async def ask(app, path="/x", headers=(HERE,), body=(b"",), method="POST"):
    """(status, headers, body) of one request, whose body comes in pieces; None: it does not come."""
    pieces, sent = list(body), []

    async def receive():
        piece = pieces.pop(0)
        if piece is None:
            await asyncio.sleep(5)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
    await app(scope, receive, send)
    start, *rest = sent
    return start["status"], dict(start["headers"]), b"".join(message["body"] for message in rest)


def answer(app, *arguments, **how):
    return asyncio.run(ask(app, *arguments, **how))


def why(app, **how):
    status, _, body = answer(app, **how)
    return status, json.loads(body)["error"]["message"]


def counted(app, reason):
    return app.telemetry.registry.get_sample_value("unclip_rejected_total", {"reason": reason}) or 0


def test_a_plain_request_goes_through_and_comes_out_with_safe_headers():
    status, headers, body = answer(door(), body=[b"ab", b"c"])
    assert (status, body) == (200, b"abc")
    assert (
        headers[b"x-content-type-options"] == b"nosniff"
        and b"default-src 'none'" in headers[b"content-security-policy"]
    )
    assert b"access-control-allow-origin" not in headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "[::1]"])
def test_on_a_loopback_address_the_names_of_this_machine_are_answered_to(host):
    assert answer(door(), headers=[(b"host", host.encode())])[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.1.2", ""])
def test_a_name_that_was_pointed_at_the_loopback_is_refused(host):
    app = door()
    assert why(app, headers=[(b"host", host.encode())])[0] == 421
    assert why(app, path="/healthz", headers=[])[0] == 421
    assert counted(app, "host") == 2
    assert answer(door(loopback=False), headers=[(b"host", host.encode())])[0] == 200
    assert (
        answer(
            door(names=("evil.example", "192.168.1.2", "127.0.0.1.evil.example", "")),
            headers=[(b"host", host.encode())],
        )[0]
        == 200
    )


@pytest.mark.parametrize(
    "origins, loopback, origin, allowed",
    [
        ((), True, b"http://localhost:3000", b"http://localhost:3000"),
        ((), True, b"http://127.0.0.1:8000", b"http://127.0.0.1:8000"),  # its own page
        ((), True, b"https://evil.example", None),
        ((), True, b"null", None),
        ((), True, b"http://localhost.evil.example", None),
        ((), True, b"http://[", None),
        (("https://front.example",), True, b"https://front.example", b"https://front.example"),
        (("https://front.example",), True, b"http://front.example", None),
        (("https://front.example",), True, b"http://localhost:3000", b"http://localhost:3000"),  # allowed all the same
        (("https://front.example",), False, b"http://localhost:3000", None),
        ((), False, b"https://any.example", None),
        (("*",), False, b"https://any.example", b"*"),
    ],
)
def test_pages_from_elsewhere_may_use_the_server_only_if_their_origin_is_allowed(origins, loopback, origin, allowed):
    app = door(origins=origins, loopback=loopback)
    status, headers, _ = answer(app, headers=[HERE, (b"origin", origin)])
    assert headers.get(b"access-control-allow-origin") == allowed
    assert status == (403 if allowed is None else 200)
    preflight = [HERE, (b"origin", origin), (b"access-control-request-method", b"POST")]
    status, headers, _ = answer(app, headers=preflight, method="OPTIONS")
    assert status == (403 if allowed is None else 204)


def test_a_page_and_a_request_that_both_have_no_name_have_no_name_in_common():
    assert answer(door(loopback=False), headers=[(b"origin", b"null")])[0] == 403


def test_a_name_in_capitals_is_the_same_name():
    assert answer(door(names=("photos.example",)), headers=[(b"host", b"Photos.Example:80")])[0] == 200


def test_a_preflight_needs_no_token_and_allows_what_it_asks_for():
    app = door(token="12345678", origins=("*",))
    asked = [HERE, (b"origin", b"http://a.example"), (b"access-control-request-method", b"POST")]
    asked += [(b"access-control-request-headers", b"authorization,content-type")]
    status, headers, body = answer(app, headers=asked, method="OPTIONS")
    assert (status, body) == (204, b"") and headers[b"access-control-allow-headers"] == b"authorization,content-type"


@pytest.mark.parametrize(
    "given", [None, b"", b"Bearer", b"Bearer 1234567", b"Bearer 123456789", b"Basic 12345678", b"\xff"]
)
def test_without_the_token_only_free_paths_are_answered(given):
    app = door(token="12345678")
    headers = [HERE] + ([] if given is None else [(b"authorization", given)])
    status, answered, body = answer(app, headers=headers)
    assert status == 401 and answered[b"www-authenticate"] == b"Bearer" and b"Bearer TOKEN" in body
    assert answer(app, path="/healthz", headers=headers)[0] == 200
    assert answer(app, headers=[HERE, (b"authorization", b"bearer 12345678")])[0] == 200


def test_a_body_that_is_too_large_is_refused_by_its_length_or_when_it_has_grown():
    app = door()
    for length in (b"101", b"-1", b"many"):
        assert why(app, headers=[HERE, (b"content-length", length)])[0] == 413
    assert why(app, body=[b"x" * 60, b"x" * 60])[0] == 413
    assert answer(app, body=[b"x" * 60, b"x" * 40])[0] == 200
    assert app.held == 0 and app.inside == 0 and counted(app, "too_large") == 4


def test_all_bodies_together_are_bounded():
    app = door(queue=10)
    app.held = 200
    status, message = why(app, body=[b"x" * 60])
    assert status == 429 and app.held == 200
    assert answer(app, body=[b"x" * 40])[0] == 200


def test_one_request_too_many_is_told_to_come_back_and_later_ones_are_answered():
    app = door()

    async def crowd():
        answers = await asyncio.gather(*(ask(app, "/slow" if n < 2 else "/x") for n in range(5)))
        return answers, await ask(app), await ask(app, "/healthz")

    (*slow, third, fourth, fifth), after, _ = asyncio.run(crowd())
    assert [status for status, _, _ in slow] == [504, 504] and after[0] == 200
    for status, headers, body in (third, fourth, fifth):
        assert status == 429 and headers[b"retry-after"] == b"1" and b"try again" in body
    assert counted(app, "queue_full") == 3 and counted(app, "timeout") == 2


def test_a_body_that_does_not_come_is_not_waited_for():
    app = door()
    assert why(app, body=[b"x", None]) == (408, "the body was not here within 0.2 s")
    assert app.inside == 0 and app.held == 0


def test_what_a_page_may_not_read_it_may_not_show():
    assert answer(door())[1][b"cross-origin-resource-policy"] == b"same-site"
    assert answer(door(origins=("*",)))[1][b"cross-origin-resource-policy"] == b"cross-origin"


def test_drawing_may_take_longer():
    assert answer(door(slow=("/slow",), slow_seconds=0.3), "/slow")[0] == 504
    assert why(door(), path="/slow") == (504, "no answer within 0.2 s")


def test_a_bug_is_a_500_that_tells_nothing_and_is_logged(caplog):
    app = door()
    status, message = why(app, path="/bug")
    assert status == 500 and "secret" not in message and "secret" in caplog.text
    assert app.inside == 0


def test_a_client_that_hangs_up_is_no_bug(caplog):
    async def reads(scope, receive, send):
        raise ClientDisconnect

    app = door(reads)

    async def nothing(*message):
        raise AssertionError("nobody listens any more")

    asyncio.run(app({"type": "http", "path": "/x", "method": "POST", "headers": [HERE]}, nothing, nothing))
    assert app.telemetry.registry.get_sample_value("unclip_requests_total", {"route": "/x", "status": "499"}) == 1
    assert not caplog.text


def test_every_answer_is_counted_by_its_route_and_status():
    app = door()
    for path, body in (("/x", b""), ("/x", b"x" * 101), ("/healthz", b"")):
        answer(app, path, body=[body])
    value = app.telemetry.registry.get_sample_value
    assert value("unclip_requests_total", {"route": "/x", "status": "200"}) == 1
    assert value("unclip_requests_total", {"route": "/x", "status": "413"}) == 1
    assert value("unclip_request_seconds_count", {"route": "/x"}) == 2


def test_hosts_are_read_with_and_without_ports():
    assert [host_of(h) for h in ("a:1", "a", "[::1]:80", "[::1]", "::1", "")] == ["a", "a", "::1", "::1", "::1", ""]
    assert is_loopback("localhost.") and is_loopback("127.1.2.3") and not is_loopback("0.0.0.0")


def test_work_is_given_up_when_the_client_hangs_up():
    cancelled = []

    async def work():
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def hang_up():
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def stay():
        await asyncio.sleep(10)

    async def run():
        with pytest.raises(Exception, match="hung up"):
            await unless_gone(hang_up, work())
        return await unless_gone(stay, asyncio.sleep(0.01, "done"))

    assert asyncio.run(run()) == "done" and cancelled == [True]
