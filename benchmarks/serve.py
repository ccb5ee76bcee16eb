"""Requests/s and latency of `unclip serve` beside clip-retrieval's `back`: the same 100k vectors, the same machine.

    OMP_NUM_THREADS=1 python benchmarks/serve.py --embeddings emb --work W \\
        [--peer VENV/bin/python] [--seconds 8] [--connections 1 8 64]

The vectors are those of --embeddings, repeated with noise to --rows; the index is one that both servers read (IVF,SQ8
at a recall of 0.95), its metadata four columns, 1,000 rows a file. Queries are captions of --embeddings, or their
embeddings; answers are 10 rows with metadata. Each connection (kept open where the server does) sends its next query
when it has the answer to the last one. The load comes from a process of its own over 127.0.0.1, so it shares the
machine with the server: "CPU" is what the server's process alone spent on a request, all its threads together.

The CLIP has the text tower of ViT-B/32 (12 layers, 512 wide) and random weights, the same for both servers: what texts
cost does not depend on what they mean.

--peer: the Python of an environment with clip-retrieval (pip install clip-retrieval 'setuptools<81'). Its `back`
listens on all addresses; here it is told 127.0.0.1, otherwise it is as it comes.

Then the overload: a server that takes 32 requests at once (`--set queue=32`) meets 128 connections. It must answer 429
with Retry-After, no 5xx, and answer as fast as before once they are gone.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.pop(0)  # this folder: benchmarks have the names of packages
from clip_train.export import export_hf
from clip_train.folder import Input, Workspace
from clip_train.model import Clip, preprocess_config
from clip_train.store import EmbeddingStore, EmbeddingWriter
from retrieval.index import build_index

ROOT = Path(__file__).resolve().parent.parent
NOISE = 0.35  # length of what is added to a unit row
PART = 1000  # rows of a file, as `unclip shard` makes shards
K = 10
MOST = 200_000  # requests of one measurement
PEER = """
import flask
run = flask.Flask.run
flask.Flask.run = lambda self, host=None, **options: run(self, host="127.0.0.1", **options)
from clip_retrieval.cli import main
main()
"""


def main() -> None:
    """Parse, measure, print markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made here; kept")
    parser.add_argument("--peer", type=Path, help="Python that has clip-retrieval")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 64])
    options = parser.parse_args()
    index = prepared(options)
    bodies = queries(options.embeddings)
    servers = {"unclip": ours(index), "unclip, batch=1": ours(index, "batch=1")}
    if options.peer:
        servers["clip-retrieval"] = theirs(options.peer, index, options.work)
    measured: dict[tuple, list[dict]] = {}
    for _ in range(options.rounds):  # in turn, so that what else the machine does falls on all of them
        for name, command in servers.items():
            with running(command) as (port, pid):
                for kind, sent in bodies.items():
                    load(port, pid, sent, 4, 1.0)
                    for connections in options.connections:
                        found = load(port, pid, sent, connections, options.seconds)
                        measured.setdefault((name, kind, connections), []).append(found)
                        print(name, kind, connections, found, file=sys.stderr, flush=True)
    print("| server | query | connections | requests/s | p50 ms | p99 ms | CPU ms/request | requests | statuses |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (name, kind, connections), rounds in measured.items():
        median = {key: statistics.median(one[key] for one in rounds) for key in ("rate", "p50", "p99", "cpu")}
        statuses = sum((Counter(one["statuses"]) for one in rounds), Counter())
        print(
            f"| {name} | {kind} | {connections} | {median['rate']:.0f} | {median['p50']:.1f} | {median['p99']:.1f} | "
            f"{median['cpu']:.2f} | {sum(statuses.values())} | {dict(statuses)} |"
        )
    overload(ours(index, "queue=32"), bodies["text"])


def prepared(options: argparse.Namespace) -> Path:
    """The index folder of the repeated vectors, and beside it clip/."""
    source, work = EmbeddingStore.open(options.embeddings), options.work
    if not (work / "clip" / "open_clip_config.json").exists():
        torch.manual_seed(0)
        vision = {"image_size": 64, "layers": 3, "width": 128, "head_width": 64, "patch_size": 8}
        text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
        (work / "clip").mkdir(parents=True)
        config = {"embed_dim": source.dim, "vision_cfg": vision, "text_cfg": text}
        Clip(config, preprocess_config(64)).save(work / "clip")
    inputs = {"clip": Input(Clip.load(work / "clip").fingerprint, work / "clip")}
    space = Workspace.open(work / "emb", "embeddings", {"rows": options.rows}, inputs)
    if not space.done:
        rng = np.random.default_rng(0)
        writer = EmbeddingWriter(space.path, options.rows // PART)
        image, text, captions = source.image(), source.text(), source.table.column("caption")
        for part in range(options.rows // PART):
            rows = (part * PART + np.arange(PART)) % len(source)
            metadata = [
                {
                    "image_path": f"{part:04d}{n:05d}",
                    "caption": captions[row],
                    "captions": [captions[row]],
                    "url": f"https://images.org/{part}/{n}.jpg",
                }
                for n, row in enumerate(rows.tolist())
            ]
            noisy = [near(rows_of[rows], rng) for rows_of in (image, text)]
            writer.write(part, *noisy, np.arange(PART), metadata, {"rows": PART})
        space.publish({"rows": options.rows, "shards": []})
    build_index(work / "emb", work / "index", kind="ivf", recall=0.95)
    return work / "index"


def near(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit rows beside these."""
    noise = rng.standard_normal(rows.shape, dtype=np.float32) * (NOISE / np.sqrt(rows.shape[1]))
    return (rows + noise) / np.linalg.norm(rows + noise, axis=1, keepdims=True)


def queries(embeddings: Path) -> dict[str, list[bytes]]:
    """Request bodies of 1,000 captions, as texts and as embeddings; clip-retrieval's clients send the same."""
    store = EmbeddingStore.open(embeddings)
    texts = store.caption_texts()
    first = list({text: place for place, text in enumerate(texts)}.values())
    chosen = np.random.default_rng(1).permutation(first)[:1000]
    captions, rows = [texts[place] for place in chosen.tolist()], store.captions()[0][chosen]
    shared = {"modality": "image", "num_images": K, "num_result_ids": K, "indice_name": "bench"}
    shared |= {"use_safety_model": False, "use_violence_detector": False, "deduplicate": False}
    return {
        "embedding": [json.dumps({**shared, "embedding_input": row.tolist()}).encode() for row in rows],
        "text": [json.dumps({**shared, "text": caption}).encode() for caption in captions],
    }


def ours(index: Path, *settings: str) -> list[str]:
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--index", f"bench={index}"]
    return [*command, "--device", "cpu", *(part for setting in settings for part in ("--set", setting))]


def theirs(python: Path, index: Path, work: Path) -> list[str]:
    export_hf(work / "clip", work / "hf")
    (work / "indices.json").write_text(json.dumps({"bench": str(index.resolve())}))
    off = ("provide_aesthetic_embeddings", "enable_mclip_option", "provide_safety_model", "provide_violence_detector")
    command = [str(python), "-c", PEER, "back", "--indices_paths", str((work / "indices.json").resolve())]
    command += [part for name in (*off, "use_jit") for part in (f"--{name}", "False")]
    return [*command, "--clip_model", f"hf_clip:{(work / 'hf').resolve()}"]


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[tuple[int, int]]:
    """(port, process) of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, "--port", str(port)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 240
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
                sock.sendall(b"GET /indices-list HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
                sock.settimeout(60)
                if b"bench" in b"".join(iter(lambda sock=sock: sock.recv(4096), b"")):
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            time.sleep(0.5)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        process.wait()


def load(port: int, pid: int, bodies: list[bytes], connections: int, seconds: float) -> dict:
    """What `connections` clients saw in `seconds`, and the server's CPU time."""
    before = cpu_seconds(pid)
    began = time.perf_counter()
    answers = asyncio.run(crowd(port, bodies, connections, seconds))
    wall, spent = time.perf_counter() - began, cpu_seconds(pid) - before
    times = sorted(1000 * took for _, took in answers)
    return {
        "rate": len(answers) / wall,
        "p50": times[len(times) // 2],
        "p99": times[int(len(times) * 0.99)],
        "cpu": 1000 * spent / len(answers),
        "statuses": dict(Counter(status for status, _ in answers)),
    }


async def crowd(port: int, bodies: list[bytes], connections: int, seconds: float) -> list[tuple[int, float]]:
    """(status, seconds) of each answer."""
    answers: list[tuple[int, float]] = []
    end = time.perf_counter() + seconds

    async def client(n: int) -> None:
        reader = writer = None
        place = n * 7919
        while time.perf_counter() < end and len(answers) < MOST:
            body = bodies[place % len(bodies)]
            place += 1
            began = time.perf_counter()
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /knn-service HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body))
                writer.write(body)
                status, stays = await asyncio.wait_for(answer(reader), 60)
            except (OSError, EOFError, TimeoutError):
                status, stays = 0, False
            answers.append((status, time.perf_counter() - began))
            if not stays and writer is not None:
                writer.close()
                writer = None
        if writer is not None:
            writer.close()

    await asyncio.gather(*map(client, range(connections)))
    return answers


async def answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the connection stays) of one answer, read to its end."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head[9:12])
    headers = dict(line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    body = await reader.readexactly(int(headers[b"content-length"]))
    if status == 200 and body.count(b'"similarity"') != K:
        status = 299  # an answer, but not a whole one
    if status == 429 and b"retry-after" not in headers:
        status = 428
    stays = head.startswith(b"http/1.1") and headers.get(b"connection", b"").strip() != b"close"
    return status, stays


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def overload(command: list[str], bodies: list[bytes]) -> None:
    """Print what a server with a short queue does before, in, and after a crowd."""
    print("\n| overload | connections | answered | 429 | other | p50 ms |\n|---|---|---|---|---|---|")
    with running(command) as (port, pid):
        load(port, pid, bodies, 4, 1.0)
        for name, connections, seconds in (("before", 8, 3), ("crowd", 128, 6), ("after", 8, 3)):
            found = load(port, pid, bodies, connections, seconds)
            statuses = Counter(found["statuses"])
            good, full = statuses.pop(200, 0), statuses.pop(429, 0)
            print(f"| {name} | {connections} | {good} | {full} | {dict(statuses) or 0} | {found['p50']:.1f} |")


if __name__ == "__main__":
    main()
