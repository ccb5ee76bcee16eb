"""A tiny world, and `unclip serve` over it in a process of its own: what the faults of service are tried on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import tiny

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 32  # of the embeddings
ROWS = 10
SEARCH = {"embedding_input": [1.0] * WIDTH, "num_images": 2, "num_result_ids": 4, "indice_name": "tiny"}


def world(folder: Path, draws: bool = False) -> Path:
    """shards, clip, emb and index of ten pictures; with `draws` prior and decoder, too."""
    from clip_train.embed import embed
    from retrieval.index import build_index

    tiny.shards(folder / "shards", n=ROWS, per_shard=4)
    tiny.clip(folder / "clip", WIDTH)
    embed(folder / "shards", folder / "clip", folder / "emb")
    build_index(folder / "emb", folder / "index")
    if draws:
        from clip_train.fit import FitConfig
        from diffusion.decoder import DecoderConfig
        from diffusion.prior import PriorConfig
        from diffusion.train_decoder import train_decoder
        from diffusion.train_prior import train_prior

        few = FitConfig(steps=1, batch_size=4, precision="fp32")
        small = DecoderConfig(
            image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16, cond_width=32
        )
        train_prior(folder / "emb", folder / "prior", PriorConfig(width=32, depth=1, heads=2), few, device="cpu")
        train_decoder(folder / "shards", folder / "clip", folder / "decoder", small, few, device="cpu")
    return folder


def alike(one: list[dict], other: list[dict]) -> bool:
    """Whether two answers are the same; cosines of queries that are searched together differ in their last digits."""
    plain = [[{**hit, "similarity": 0} for hit in answer] for answer in (one, other)]
    pairs = zip(one, other, strict=False)
    return plain[0] == plain[1] and all(abs(a["similarity"] - b["similarity"]) < 1e-5 for a, b in pairs)


class Site:
    """Where a server is, and whether it is well."""

    def __init__(self, port: int, pid: int) -> None:
        self.address, self.pid = ("127.0.0.1", port), pid
        self.root = f"http://127.0.0.1:{port}"
        self.truth = self.ask("/knn-service", SEARCH)

    def ask(self, path: str, fields: dict | None = None, seconds: float = 30.0) -> object:
        """The JSON of an answer; OSError if it is an error."""
        data = None if fields is None else json.dumps(fields).encode()
        with urllib.request.urlopen(self.root + path, data=data, timeout=seconds) as answer:
            return json.loads(answer.read())

    def ails(self) -> str:
        """What is wrong with it; "" if it answers as it did in the beginning."""
        try:
            same = alike(self.ask("/knn-service", SEARCH), self.truth)
            return "" if same else "another answer than in the beginning"
        except OSError as error:
            return f"it does not answer any more: {error}"

    def megabytes(self) -> float:
        """Resident memory of the process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def connect(self, seconds: float = 30.0) -> socket.socket:
        """A socket of one's own."""
        return socket.create_connection(self.address, timeout=seconds)

    def exchange(self, data: bytes, seconds: float = 30.0) -> bytes:
        """All that comes back until the server closes; send "Connection: close". TimeoutError if it does not."""
        with self.connect(seconds) as sock:
            try:
                sock.sendall(data)
            except OSError:  # it has answered and closed already
                pass
            return rest(sock)


def rest(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    got, until = b"", time.monotonic() + (sock.gettimeout() or 30.0)
    while time.monotonic() < until:
        try:
            piece = sock.recv(65536)
        except ConnectionError:
            return got
        if not piece:
            return got
        got += piece
    raise TimeoutError("it goes on for ever")


class Process(Site):
    """`unclip serve` in a process. options: besides the index; log: what it says, kept for reading."""

    def __init__(self, index: Path, *options: str, port: int = 0) -> None:
        command = [sys.executable, "-c", "import cli; cli.main()", "serve", "--index", f"tiny={index}", *options]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.log = open(Path(index).with_name("serve.log"), "a+", encoding="utf-8")  # noqa: SIM115
        self.log.seek(0, os.SEEK_END)
        begin = self.log.tell()
        self.process = subprocess.Popen(
            [*command, "--device", "cpu", "--port", str(port)], stderr=self.log, stdout=self.log, cwd=ROOT, env=env
        )
        until = time.monotonic() + 120
        while "http://" not in (said := self.said(begin)):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server does not start: {said}")
            time.sleep(0.1)
        port = int(said.rpartition("http://127.0.0.1:")[2].split("/")[0])
        super().__init__(port, self.process.pid)

    def said(self, begin: int = 0) -> str:
        """Its log."""
        self.log.seek(begin)
        return self.log.read()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal; its exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.log.close()
