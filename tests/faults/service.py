"""Service: rough clients, crowds, restarts, an index that is replaced, and memory, on a server of its own process."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rough_clients
import tiny
from outcome import Outcome, Tally
from sites import SEARCH, WIDTH, Process, Site, alike, world

QUICK = ("--set", "seconds=6", "--set", "reload_seconds=0.2", "--set", "draw_seconds=30")
GROWTH = 4.0  # MB per 1,000 requests, after the first thousands, that are no leak: the allocator's
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
CHECKS += "response_headers_conformance,unsupported_method"


def attempt(site: Site, kind: str, seed: int, number: int) -> Outcome:
    """One rough client; afterwards the server must answer others as before."""
    try:
        wrong = rough_clients.KINDS[kind](site, random.Random(f"{seed} {kind} {number}"))
    except TimeoutError as error:
        return Outcome("hang", str(error))
    except (OSError, ValueError) as error:
        wrong = repr(error)
    wrong = wrong or site.ails()
    return Outcome("wrong", wrong) if wrong else Outcome("done")


def run(numbers: Iterable[int], seed: int, folder: Path, tell: Callable) -> Tally:
    """Every kind; counts and durations grow with the cases. Prints memory and rates besides."""
    numbers, tally = list(numbers), Tally()
    made = world(folder, draws=True)
    models = ("--decoder", str(made / "decoder"), "--prior", str(made / "prior"))
    site = Process(made / "index", *models, *QUICK)
    rough(site, numbers, seed, tally, tell)
    schema(site, len(numbers), seed, tally)
    sequence(site, 25 * len(numbers), tally)
    crowd(site, 0.3 * len(numbers), tally)
    idle(site, 6 * len(numbers), tally)
    if "Traceback" in (said := site.said()):
        tally.add("the server's log", "tracebacks", Outcome("traceback", said[said.index("Traceback") :][-600:]))
    tally.add("told to stop", "SIGTERM", Outcome("done" if site.stop() == 0 else "wrong", "exit code"))
    restarts(made, max(1, len(numbers) // 100), tally)
    replacements(folder / "more", max(2, len(numbers) // 20), tally)
    return tally


def rough(site: Site, numbers: list[int], seed: int, tally: Tally, tell: Callable) -> None:
    """The clients that behave badly, sixteen at once."""
    kinds = list(rough_clients.KINDS)

    def one(number: int) -> tuple[str, int, Outcome]:
        kind = kinds[number % len(kinds)]
        return kind, number, attempt(site, kind, seed, number // len(kinds))

    with ThreadPoolExecutor(16) as pool:
        for done, (kind, number, outcome) in enumerate(pool.map(one, numbers), 1):
            tally.add(kind, f"case {number}", outcome)
            tell(done, len(numbers))


def schema(site: Site, cases: int, seed: int, tally: Tally) -> None:
    """schemathesis on the description, if it is installed (the extra "fuzz"); a row of the table says if it is not."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{site.root}/openapi.json", "-c", CHECKS]
    command += ["--seed", str(seed), "--max-examples", str(max(5, cases // 4)), "--phases", "coverage,fuzzing,stateful"]
    if not Path(command[0]).exists():
        tally.add("schemathesis: left out, it is not installed", "", Outcome("skipped"))
        return
    done = subprocess.run(command, capture_output=True, text=True, cwd=site.log.name and Path(site.log.name).parent)
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    made, passed = map(int, found.groups()) if found else (1, 0)
    for number in range(made):
        fine = number < passed and (done.returncode == 0 or passed < made)
        tally.add("schemathesis", str(number), Outcome("done") if fine else Outcome("wrong", done.stdout[-1500:]))


def sequence(site: Site, connections: int, tally: Tally) -> None:
    """One connection after the other, and what they leave in memory."""
    asks = (("/knn-service", SEARCH), ("/api/info", None), ("/healthz", None), ("/v1/embeddings", {"input": "a fox"}))
    began, memory = time.monotonic(), []
    for number in range(connections):
        if number % 1000 == 0:
            memory.append(site.megabytes())
        path, fields = asks[number % len(asks)]
        try:
            site.ask(path, fields)
            tally.add("connections in sequence", str(number), Outcome("done"))
        except (OSError, ValueError) as error:
            tally.add("connections in sequence", str(number), Outcome("wrong", repr(error)))
    memory.append(site.megabytes())
    print(f"{connections} connections in sequence: {connections / (time.monotonic() - began):.0f} a second")
    grew(memory, "in sequence", tally)


def grew(memory: list[float], what: str, tally: Tally) -> None:
    """Print and judge the growth; memory in MB before every 1,000 requests, the first 2,000 warm it up."""
    steady = memory[2:] if len(memory) > 4 else memory
    each = (steady[-1] - steady[0]) / max(1, len(steady) - 1)
    print(f"memory {what}: {memory[0]:.0f} MB, {memory[-1]:.0f} MB in the end; {each:+.2f} MB per 1,000 requests")
    leaks = len(memory) > 4 and each > GROWTH
    tally.add("memory", what, Outcome("wrong", f"{each:.1f} MB per 1,000 requests") if leaks else Outcome("done"))


def crowd(site: Site, seconds: float, tally: Tally) -> None:
    """64 clients at once, who ask again and again; 429 is an answer, too."""
    until, lock, memory = time.monotonic() + seconds, threading.Lock(), [site.megabytes()]
    kind, took, count = f"64 at once for {seconds:.0f} s", [], [0]

    def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            row = np.random.default_rng(rng.randrange(1000)).standard_normal(WIDTH).tolist()
            text = {**SEARCH, "text": f"a fox {rng.randrange(1000)}"}
            fields = rng.choice(({**SEARCH, "embedding_input": row}, text))
            began = time.monotonic()
            try:
                outcome = Outcome("done" if len(site.ask("/knn-service", fields)) == 4 else "wrong")
            except urllib.error.HTTPError as error:
                outcome = Outcome("skipped" if error.code == 429 else "wrong", str(error))
            except (OSError, ValueError) as error:
                outcome = Outcome("wrong", repr(error))
            with lock:
                tally.add(kind, str(number), outcome)
                took.append(time.monotonic() - began)
                count[0] += 1
                if count[0] % 1000 == 0:
                    memory.append(site.megabytes())

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(client, range(64)))
    if took:
        middle, late = np.percentile(took, [50, 99])
        print(f"{kind}: {len(took) / seconds:.0f} a second; {middle:.2f} s in the middle, {late:.2f} s at 99 %")
    grew([*memory, site.megabytes()], "with 64 at once", tally)


def idle(site: Site, connections: int, tally: Tally) -> None:
    """More connections than there are places, which ask for nothing: others are answered all the same, and soon."""
    held = []
    try:
        for _ in range(connections):
            held.append(site.connect(5))
        for number in range(20):
            began = time.monotonic()
            wrong = site.ails() or ("late" if time.monotonic() - began > 5 else "")
            tally.add(f"{connections} idle connections", str(number), Outcome("wrong" if wrong else "done", wrong))
    finally:
        for one in held:
            one.close()


def restarts(made: Path, times: int, tally: Tally) -> None:
    """Killed with -9 under load and started again on the same port: clients that try again are all answered right."""
    alone = made / "alone" / "index"  # without its CLIP, which would take seconds to load
    shutil.copytree(made / "index", alone)
    shutil.rmtree(made / "clip")
    site = Process(alone, *QUICK)
    port, truth, over, lock = site.address[1], site.truth, threading.Event(), threading.Lock()
    client_of = Site.__new__(Site)
    client_of.root = site.root

    def client(_: int) -> None:
        while not over.is_set():
            until = time.monotonic() + 60
            while True:
                try:
                    outcome = Outcome("done" if alike(client_of.ask("/knn-service", SEARCH, 10), truth) else "wrong")
                except (OSError, ValueError) as error:  # nobody there: it tries again
                    if time.monotonic() < until:
                        time.sleep(0.1)
                        continue
                    outcome = Outcome("hang", repr(error))
                break
            with lock:
                tally.add("restart under load", "a client that tries again", outcome)
            time.sleep(0.01)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, n) for n in range(8)]
        for _ in range(times):
            time.sleep(0.5)
            site.stop(signal.SIGKILL)
            site = Process(alone, *QUICK, port=port)
        time.sleep(0.5)
        over.set()
        for one in clients:
            one.result()
    site.stop()


def replacements(folder: Path, times: int, tally: Tally) -> None:
    """Another index takes the folder's place again and again under load: no request fails, each is of one of them."""
    from retrieval.index import build_index
    from retrieval.swap import exchange

    folder.mkdir()
    for name in ("one", "two"):
        tiny.store(folder / f"emb_{name}", tiny.unit_rows(40, WIDTH, len(name) + ord(name[0])))
        build_index(folder / f"emb_{name}", folder / name)
    shutil.copytree(folder / "one", folder / "index")
    shutil.copytree(folder / "two", folder / "other")
    truths, over, lock = [], threading.Event(), threading.Lock()
    for name in ("two", "one"):
        exchanged = Process(folder / name, *QUICK)
        truths.append(exchanged.truth)
        exchanged.stop()
    site, seen = Process(folder / "index", *QUICK), set()

    def client(_: int) -> None:
        while not over.is_set():
            try:
                answer = site.ask("/knn-service", SEARCH)
                which = next((n for n, truth in enumerate(truths) if alike(answer, truth)), -1)
                outcome = Outcome("done") if which >= 0 else Outcome("wrong", json.dumps(answer)[:200])
                seen.add(which)
            except (OSError, ValueError) as error:
                outcome = Outcome("wrong", repr(error))
            with lock:
                tally.add("index replaced while serving", "a request", outcome)

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, n) for n in range(4)]
        for number in range(times):
            if number % 2:  # as people do it: for a moment there is no folder
                os.rename(folder / "index", folder / "old")
                os.rename(folder / "other", folder / "index")
                os.rename(folder / "old", folder / "other")
            else:
                exchange(folder / "index", folder / "other")
            time.sleep(0.5)
        over.set()
        for one in clients:
            one.result()
    both = Outcome("done") if seen == {0, 1} else Outcome("wrong", f"it served {sorted(seen)} of two indexes")
    tally.add("index replaced while serving", "both were served", both)
    site.stop()
