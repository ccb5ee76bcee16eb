"""Attack: what a stranger may send, and what must never come of it: connections inside, files, headers, commands."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import addresses
from outcome import Outcome, Tally
from target import CANARY, TOKEN, Target


def inner_addresses(target: Target, rng: random.Random) -> str:
    """fetch() of `unclip shard --fetch`, and image_url: an address that leads inside is never connected to."""
    from clip_train.fetch import FetchConfig, FetchError, fetch

    url = addresses.address(rng)
    with addresses.watched() as tried:
        if rng.random() < 0.8:
            try:
                fetch(url, FetchConfig(retries=0, timeout=2))
                return f"{url!r} was fetched"
            except FetchError as error:
                if "\n" in str(error):
                    return f"{url!r}: {error}"
        else:
            answer = target.ask("POST", "/knn-service", {"image_url": url, "num_images": 1})
            if answer.status_code != 400:
                return f"{url!r}: {answer.status_code}"
            if any(name in answer.text for name in ("10.0.0.1", "192.168.0.1", "fd00::1")):
                return f"{url!r}: the answer tells the inner address: {answer.text}"
    inside = [one for one in tried if one != addresses.PUBLIC]
    return f"{url!r} was connected to at {inside}" if inside else ""


def redirects(target: Target, rng: random.Random) -> str:
    """A public server that sends on to an inner address: nobody follows."""
    import clip_train.fetch as module

    url, asked = addresses.address(rng), []
    real, config = module._get, module.FetchConfig(retries=0, timeout=2)

    def get(address: str, *rest: object) -> bytes | str:
        asked.append(address)
        return module.urljoin(address, url) if len(asked) == 1 else real(address, *rest)

    module._get = get
    try:
        with addresses.watched() as tried:
            module.fetch("http://public.test/a", config)
        return f"{url!r} was fetched"
    except module.FetchError:
        return f"{url!r}: {tried}" if any(one != addresses.PUBLIC for one in tried) else ""
    finally:
        module._get = real


def paths(target: Target, rng: random.Random) -> str:
    """Wherever a name could become a path or a header, it does not."""
    up = "../" * rng.randint(1, 6)
    names = (
        f"{up}canary.txt",
        f"{up}etc/passwd",
        "/etc/passwd",
        "..\\..\\canary.txt",
        "canary.txt\0.png",
        "C:\\x",
        "~",
    )
    names += ("a\r\nX-Evil: 1", "a\nSet-Cookie: x=1", "file:///etc/passwd", "%2e%2e%2fcanary.txt", "....//canary.txt")
    name = rng.choice(names)
    quoted = "".join(f"%{byte:02X}" for byte in name.encode())
    row = rng.randrange(10)
    asks: tuple[tuple, ...] = (
        ("GET", f"/{rng.choice((name.split(chr(0))[0].split(chr(13))[0].split(chr(10))[0], quoted))}"),
        ("GET", f"/api/picture/{quoted}/{row}"),
        ("GET", f"/api/picture/tiny/{quoted}"),
        ("GET", f"/api/picture/tiny/{row}?key={quoted}&side={rng.choice(('', '64', quoted))}"),
        ("GET", f"/api/details/tiny/{row}?key={quoted}"),
        ("POST", "/knn-service", {"text": name, "indice_name": rng.choice((name, "tiny"))}),
        ("POST", "/metadata", {"ids": [name], "indice_name": name}),
        ("POST", "/v1/embeddings", {"model": name, "input": name}),
        ("POST", "/api/search", {"terms": [{"kind": "key", "value": name}], "index": rng.choice((name, "tiny"))}),
        ("POST", "/api/search", {"terms": [{"kind": "image", "value": name}], "where": name}),
        ("POST", "/api/generate", {"from": [{"index": name, "row": 0, "key": name}], "mode": "vary"}),
    )
    one = rng.choice(asks)
    with target.watch as watch:
        answer = target.ask(*one)
    if answer.status_code >= 500:
        return f"{one}: {answer.status_code}"
    if CANARY in answer.text or "root:" in answer.text or {"x-evil", "set-cookie"} & set(answer.headers):
        return f"{one}: {answer.headers} {answer.text[:200]}"
    opened = [what for event, what in watch.seen if event == "open" and ("canary" in what or "passwd" in what)]
    return f"{one} opened {opened}" if opened else ""


def tokens(target: Target, rng: random.Random) -> str:
    """All but the very token is refused, before anything else is said."""
    near = [TOKEN[:-1], TOKEN + "x", TOKEN.upper(), TOKEN[::-1], "", " ", f"{TOKEN} {TOKEN}", TOKEN[: rng.randrange(8)]]
    near += ["".join(rng.choices("abc\xff-", k=rng.randint(1, 400))), f"'{TOKEN}'", f"x{TOKEN}"]
    kind = rng.choice(("Bearer ", "bearer ", "Basic ", "", "Token ", "Bearer\t"))
    given = (kind + rng.choice(near)).encode("latin-1")
    paths_ = (
        "/metrics",
        "/openapi.json",
        "/api/info",
        "/indices-list",
        "/v1/models",
        "/api/picture/tiny/0",
        "/nothing",
    )
    path, how = rng.choice(paths_), rng.choice(({}, {"Authorization": given}, {"X-Api-Key": TOKEN}))
    path += rng.choice(("", f"?token={TOKEN}", f"?access_token={TOKEN}"))
    answer = target.client.request(rng.choice(("GET", "POST")), path, headers=how)
    return "" if answer.status_code == 401 and TOKEN not in answer.text else f"{path} {how}: {answer.status_code}"


def names_and_origins(target: Target, rng: random.Random) -> str:
    """DNS rebinding: a name that somebody else may own is no name of this server, and his pages may not ask it."""
    owned = (
        "evil.test",
        "localhost.evil.test",
        "127.0.0.1.evil.test",
        "evil.test:80",
        "localhost-evil.test",
        "0.0.0.0",
    )
    one = rng.choice(
        (*owned, "EVIL.TEST", "evil.test.", "evil.test#localhost", "[::]", "10.0.0.1", "\xff", "xn--localhost")
    )
    path = rng.choice(("/", "/healthz", "/api/info", "/indices-list", "/config.json", "/metrics"))
    if rng.random() < 0.5:
        answer = target.at_home.get(path, headers={"Host": one.encode("latin-1")})
        return "" if answer.status_code == 421 else f"{path} as {one!r}: {answer.status_code}"
    origin = rng.choice((f"http://{one}", f"https://{one}", "null", "file://", "http://["))
    method, asks = rng.choice((("GET", {}), ("POST", {}), ("OPTIONS", {"Access-Control-Request-Method": "POST"})))
    answer = target.at_home.request(method, path, headers={"Origin": origin.encode("latin-1"), **asks})
    fine = answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    return "" if fine else f"{method} {path} of {origin!r}: {answer.status_code}"


def expressions(target: Target, rng: random.Random) -> str:
    """--where is no Python, no SQL and no shell: nothing is compiled, imported, opened or run."""
    from retrieval.query import QueryError
    from retrieval.where import parse

    evil = ["__import__('os').system('true')", "().__class__.__bases__[0].__subclasses__()", "exec('1')", "eval('1')"]
    evil += ["width.__class__ == 1", "'; DROP TABLE x; --", "1 or 1=1", "$(true)", "`true`", "${jndi:ldap://x}", "\0"]
    evil += ["caption.format('{0.x}')", "caption.matches('(a+)+$')", "caption.str.eval('1')", "@x", "lambda: 0", "{}"]
    evil += ["open('/etc/passwd')", "caption[0]", "caption.contains(caption)", "f'{1}'", "`__class__` == 1"]
    around = rng.choice(("{}", "width > 1 and {}", "({})", "not {}", "{} == 1", "caption == '{}'"))
    text = around.replace("{}", rng.choice(evil))
    with target.watch as watch:
        try:
            parse(text).mask(target.table)
        except QueryError as error:
            if "\n" in str(error).strip():
                return f"{text!r}: {error}"
    bad = watch.ran() + [what for event, what in watch.seen if "passwd" in what]
    return f"{text!r} led to {bad}" if bad else ""


def secrets(target: Target, rng: random.Random) -> str:
    """The token stands in no answer and no log, whatever goes wrong."""
    path = rng.choice(
        ("/api/info", "/metrics", "/openapi.json", "/config.json", "/nothing", "/healthz", "/knn-service")
    )
    method = rng.choice(("GET", "POST", "PUT", "OPTIONS"))
    fields = rng.choice((None, {"text": "a"}, {"text": 1}, [], {"image": TOKEN[:4]}))
    hall = target.app.state.hall
    real = hall.index
    if rng.random() < 0.5:  # a bug on the way
        hall.index = lambda *_: 1 / 0
    try:
        answer = target.ask(method, path, fields)
    finally:
        hall.index = real
    told = answer.text + str(answer.headers) + repr(hall.config) + "".join(target.log)
    target.log.clear()
    return f"{method} {path} tells the token" if TOKEN in told else ""


KINDS: dict[str, Callable[[Target, random.Random], str]] = {
    "addresses that lead inside": inner_addresses,
    "redirects that lead inside": redirects,
    "names that could be paths or headers": paths,
    "tokens": tokens,
    "host names and origins": names_and_origins,
    "expressions in --where": expressions,
    "secrets": secrets,
}


def attempt(target: Target, kind: str, seed: int, number: int) -> Outcome:
    """One attack."""
    try:
        wrong = KINDS[kind](target, random.Random(f"{seed} {kind} {number}"))
    except Exception as error:
        return Outcome("traceback", repr(error))
    return Outcome("wrong", wrong) if wrong else Outcome("done")


def run(numbers: Iterable[int], seed: int, folder: Path, tell: Callable) -> Tally:
    """Ten attacks of each kind for a number."""
    target, tally, numbers = Target(folder), Tally(), list(numbers)
    for done, number in enumerate(numbers, 1):
        for kind in KINDS:
            for n in range(10 * number, 10 * number + 10):
                tally.add(kind, f"case {number} ({n})", attempt(target, kind, seed, n))
        tell(done, len(numbers))
    target.close()
    return tally
