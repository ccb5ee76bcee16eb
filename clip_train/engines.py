"""Who makes the parts of an embeddings folder: this process, several on this machine, or a Ray cluster; and which ones.

Every engine takes shards and a recipe and has written each shard's part when it returns; part.py says how one is made.
"""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clip_train.embed import encode_texts
from clip_train.memory import keep_freed_memory
from clip_train.model import Clip
from clip_train.part import Batch, Part, Recipe, Shard, batches_of, make_part
from clip_train.settings import UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ENGINES = ("local", "ranks", "ray")
DECODING_CPUS = 0.5  # of a Ray task that decodes: it waits for its tar now and then
# on_part(part, samples of it that have been through the CLIP, bad ones among them)
OnPart = Callable[[int, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of the shards are this process's, when several that know nothing of each other embed into one folder."""

    rank: int = 0
    ranks: int = 1

    def has(self, part: int) -> bool:
        return part % self.ranks == self.rank

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Share":
        """From RANK and WORLD_SIZE (torchrun, or set by hand), else from the variables of a SLURM job array.

        A variable missing: the only process there is. UserError if they contradict each other.
        """
        try:
            if "WORLD_SIZE" in environment:
                rank, ranks = int(environment.get("RANK", "0")), int(environment["WORLD_SIZE"])
            elif "SLURM_ARRAY_TASK_COUNT" in environment:
                number = {name: int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "COUNT", "MIN", "MAX")}
                step = (number["MAX"] - number["MIN"]) // max(1, number["COUNT"] - 1) or 1
                rank, ranks = (number["ID"] - number["MIN"]) // step, number["COUNT"]
                if number["MIN"] + rank * step != number["ID"] or number["MIN"] + (ranks - 1) * step != number["MAX"]:
                    raise UserError("a SLURM array must be a range, such as --array=0-7; finish by a run without one")
            else:
                return cls()
        except (KeyError, ValueError) as error:
            raise UserError(f"RANK, WORLD_SIZE or SLURM_ARRAY_TASK_* make no sense: {error}") from error
        if not 0 <= rank < ranks:
            raise UserError(f"RANK {rank} must be at least 0 and below WORLD_SIZE {ranks}")
        return cls(rank=rank, ranks=ranks)


def make_here(shards: Sequence[Shard], recipe: Recipe, clip: Clip, on_part: OnPart) -> None:
    """One shard after the other in this process, by a CLIP that recipe.ready() made."""
    writer = recipe.writer()
    with ThreadPoolExecutor(max(torch.get_num_threads(), 2)) as pool:
        for shard in shards:
            make_part(shard, recipe, clip, writer, pool, lambda done, bad, part=shard.part: on_part(part, done, bad))


# Several processes of this machine


def make_in_processes(shards: Sequence[Shard], recipe: Recipe, workers: int, lock: int | None, on_part: OnPart) -> None:
    """By `workers` processes, each with a CLIP of its own; whoever is free takes the next shard.

    With device "cuda" they spread over this machine's GPUs. lock: a descriptor that each keeps open as long as it
    lives, so that nobody else writes the folder while one is left. UserError: what one of them raises, or that one was
    killed.
    """
    import multiprocessing
    from multiprocessing.connection import wait
    from multiprocessing.reduction import send_handle

    start = multiprocessing.get_context("spawn")
    if "forkserver" in multiprocessing.get_all_start_methods():  # torch is loaded once for all of them
        start = multiprocessing.get_context("forkserver")
        start.set_forkserver_preload([__name__, "clip_train.inference", "pyarrow.parquet", "pandas"])
    threads = max(1, torch.get_num_threads() // workers)
    left, busy = list(reversed(shards)), {}
    crew: dict[Connection, Any] = {}
    try:
        for number in range(min(workers, len(shards))):
            ours, theirs = start.Pipe()
            mate = start.Process(
                target=_mate,
                args=(theirs, replace(recipe, device=device_of(recipe.device, number)), threads, lock is not None),
                daemon=True,
            )
            mate.start()
            theirs.close()
            crew[ours] = mate
            if lock is not None:
                send_handle(ours, lock, mate.pid)
        while crew:
            for connection in wait(list(crew)):
                try:
                    kind, *news = connection.recv()
                except (EOFError, OSError):
                    crew[connection].join()
                    raise UserError(_how_it_ended(crew[connection].exitcode, busy.get(connection))) from None
                if kind == "done":
                    on_part(busy[connection].part, *news)
                elif kind == "failed":
                    raise UserError(news[0])
                elif kind == "broke":
                    raise RuntimeError(f"in a worker process:\n{news[0]}")
                else:
                    busy[connection] = left.pop() if left else None
                    try:
                        connection.send(busy[connection])
                    except OSError:  # killed since it asked
                        crew[connection].join()
                        raise UserError(_how_it_ended(crew[connection].exitcode, busy[connection])) from None
                    if busy[connection] is None:
                        crew.pop(connection).join()
    finally:
        for mate in crew.values():
            mate.terminate()
        for mate in crew.values():
            mate.join()


def _mate(connection: "Connection", recipe: Recipe, threads: int, locked: bool) -> None:
    """What a worker process does: ask for a shard, make its part, ask again."""
    import traceback
    from multiprocessing.reduction import recv_handle

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if locked:
        recv_handle(connection)  # kept until this process ends
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        writer = recipe.writer()
        clip = recipe.load()
        with ThreadPoolExecutor(max(threads, 2)) as pool:
            connection.send(("ready",))
            while (shard := connection.recv()) is not None:
                make_part(shard, recipe, clip, writer, pool, lambda *numbers: connection.send(("done", *numbers)))
                connection.send(("ready",))
    except UserError as error:
        connection.send(("failed", str(error)))
    except (EOFError, BrokenPipeError):
        pass  # nobody is listening any more
    except Exception:
        connection.send(("broke", traceback.format_exc()))


def _end_with_parent() -> None:
    import multiprocessing

    multiprocessing.parent_process().join()
    os._exit(1)


def device_of(device: str, number: int) -> str:
    """The device of one of several processes: "cuda" is shared out, each of the others is what it is."""
    count = torch.cuda.device_count() if device == "cuda" else 0
    return f"cuda:{number % count}" if count else device


def _how_it_ended(code: int | None, shard: Shard | None) -> str:
    what = f"was killed (signal {-code})" if code and code < 0 else f"ended with code {code}"
    where = f" while it embedded {shard.tar}" if shard else ""
    return f"a worker process {what}{where}; is there enough memory for all --workers? Run the same command to go on"


# Ray


def make_on_ray(shards: Sequence[Shard], recipe: Recipe, workers: int, on_part: OnPart) -> None:
    """By Ray Data: tasks on any CPU of the cluster decode, `workers` actors encode, and this process writes the parts.

    Decoded pictures stream into the actors, each of which takes a GPU if recipe.device is one. All nodes must see the
    tars and the CLIP under the same paths, and have unclip installed. Joins the cluster of RAY_ADDRESS or the one that
    `ray start --head` began here, else starts one. UserError in a task's own words, or if the cluster is too small.
    """
    ray, needs = _cluster(), _needs(recipe.device)
    _refuse_too_small(ray.cluster_resources(), workers, needs)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    tasks = ray.data.from_items([vars(shard) for shard in shards], override_num_blocks=len(shards))
    how: dict[str, Any] = {"batch_size": 1, "batch_format": "pandas"}
    # with needs of its own, it is a stage of its own: Ray would run the decoding in the actors
    decoded = tasks.map_batches(_decode, fn_kwargs={"recipe": recipe}, num_cpus=DECODING_CPUS, **how)
    actors = ray.data.ActorPoolStrategy(size=workers)
    encoded = decoded.map_batches(_Encoder, fn_constructor_kwargs={"recipe": recipe}, compute=actors, **needs, **how)
    try:
        _gather(encoded.iter_rows(), {shard.part: shard for shard in shards}, recipe, on_part)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)  # Ray's own error holds the whole traceback
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        raise


def device_on_ray(device: str) -> str:
    """ "auto" as what it comes to on the cluster: "cuda" where it has GPUs, whatever the machine that asks has."""
    has = _cluster().cluster_resources()
    return device if device != "auto" else "cuda" if has.get("GPU", 0) >= 1 else "cpu"


def precision_on_ray(clip: str, device: str) -> dict[str, str]:
    """What Clip.for_inference("auto") comes to where the actors will run."""
    ray = _cluster()
    task = ray.remote(**_needs(device))(lambda: Clip.load(clip, device).for_inference("auto").precision)
    return ray.get(task.remote())


def _cluster() -> Any:
    """The module ray, in touch with a cluster. UserError if it is not installed."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'unclip[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    return ray


def _needs(device: str) -> dict[str, int]:
    return {"num_gpus": 1, "num_cpus": 0} if device.startswith("cuda") else {"num_cpus": 1}


def _refuse_too_small(has: Mapping[str, float], workers: int, needs: Mapping[str, float]) -> None:
    cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
    if cpus < workers * needs["num_cpus"] + DECODING_CPUS or gpus < workers * needs.get("num_gpus", 0):
        raise UserError(
            f"the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs: too little for {workers} encoding actors and the "
            f"decoding beside them; use fewer --workers, or --engine local"
        )


def _decode(table: Any, recipe: Recipe) -> Iterator[Any]:
    """A table of one shard -> tables of one row: its batches, then one row that says how many there are."""
    import pandas as pd

    torch.set_num_threads(1)
    shard, number = Shard(**table.iloc[0].to_dict()), -1
    with ThreadPoolExecutor(1) as pool:
        part = Part()
        for number, batch in enumerate(batches_of(shard, recipe, pool)):
            part.add(batch)
            pixels = b"" if batch.pixels is None else batch.pixels.numpy().tobytes()
            shape = [] if batch.pixels is None else list(batch.pixels.shape)
            known = {"metadata": batch.metadata, "bad": batch.bad, "shard": batch.shard}
            about = json.dumps({"shape": shape, "known": known})
            yield pd.DataFrame({"part": [shard.part], "batch": [number], "data": [pixels], "about": [about]})
    texts = json.dumps({"texts": part.texts, "batches": number + 1})
    yield pd.DataFrame({"part": [shard.part], "batch": [-1], "data": [b""], "about": [texts]})


class _Encoder:
    """An actor of the pool: pixels or captions -> rows."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.failed = recipe, None
        try:
            self.clip = recipe.load()
        except UserError as error:
            self.failed = error  # raised here, Ray would tell it as the death of an actor

    def __call__(self, table: Any) -> Any:
        if self.failed:
            raise self.failed
        about = json.loads(table["about"].iloc[0])
        if "texts" in about:
            rows = encode_texts(self.clip, about.pop("texts"), batch_size=self.recipe.batch_size)
        elif about["shape"]:
            pixels = torch.frombuffer(bytearray(table["data"].iloc[0]), dtype=torch.uint8).view(about["shape"])
            rows = self.clip.encode_image(pixels).numpy()
        else:
            rows = np.empty((0, self.clip.embed_dim), dtype=np.float32)
        about["dim"] = rows.shape[1]
        return table.assign(data=[rows.astype(np.float32).tobytes()], about=[json.dumps(about)])


def _gather(rows: Iterator[dict[str, Any]], shards: dict[int, Shard], recipe: Recipe, on_part: OnPart) -> None:
    """Write each part as soon as all its rows are here; they come in any order."""
    writer = recipe.writer()
    waiting: dict[int, dict[int, tuple[np.ndarray, dict[str, Any]]]] = {part: {} for part in shards}
    for row in rows:
        about, found = json.loads(row["about"]), waiting[row["part"]]
        found[row["batch"]] = np.frombuffer(row["data"], dtype=np.float32).reshape(-1, about["dim"]), about
        batches = [about for number, (_, about) in found.items() if number >= 0]
        bad = sum(len(about["known"]["bad"]) for about in batches)
        if -1 in found and len(batches) == found[-1][1]["batches"]:
            part = Part()
            for number in range(len(batches)):
                part.add(Batch(pixels=None, **found[number][1]["known"]))
            image = np.concatenate([found[number][0] for number in range(len(batches))] or [found[-1][0][:0]])
            part.write(writer, shards[row["part"]], image, found[-1][0])
            del waiting[row["part"]]
        on_part(row["part"], sum(len(about["known"]["metadata"]) for about in batches) + bad, bad)
