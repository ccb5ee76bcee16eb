"""Rows -> a FAISS index of one kind, from parts, out of core.

Its stages are files in a scratch folder, each whole or absent, so a killed build goes on from those that are there:
centres (k-means, on a bounded sample), the centre of every row, the trained empty index, the parts, the merged index.
Kinds with lists share the first two. A part is a range of rows added to a copy of the trained empty index; parts may be
made by other processes, or by Ray on other machines that see the same folders, and do not depend on who made them.
"""

import contextlib
import io
import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import torch

from clip_train.folder import read_manifest, write_file
from clip_train.settings import Progress, UserError
from clip_train.store import EmbeddingStore
from retrieval.exact import bfloat16_is_faster
from retrieval.kinds import Kind

ENGINES = ("local", "ray")
BLOCK = 32_768  # rows in memory at a time
PART = 524_288  # rows of a part, at most
SAMPLE = 262_144  # rows that k-means sees, at most
ROWS_PER_LIST = 48  # that k-means asks for; faiss warns below 39
ROUNDS = 10  # of k-means
TRAINING = 16_384  # rows that codes and rotations are trained on


class Rows(Protocol):
    """What is indexed: an EmbeddingStore, or anything that hands out unit rows as it does."""

    dim: int

    def __len__(self) -> int: ...

    def image(self, rows: np.ndarray) -> np.ndarray: ...

    def text(self, rows: np.ndarray) -> np.ndarray: ...


def rows_of(store: Rows, modality: str, rows: np.ndarray | range) -> np.ndarray:
    """(N, D) float32 rows of one modality."""
    return (store.image if modality == "image" else store.text)(np.asarray(rows))


def build(
    store: Rows,
    modality: str,
    kind: Kind,
    scratch: Path,
    *,
    workers: int = 1,
    engine: str = "local",
    on_progress: Progress | None = None,
) -> Path:
    """The file of the finished index, in `scratch`. workers: processes; engine: where they run, local or ray."""
    scratch = Path(os.path.abspath(scratch))  # other processes may stand elsewhere
    path = scratch / f"{_slug(kind)}.index"
    if path.exists():
        return path
    scratch.mkdir(parents=True, exist_ok=True)
    if kind.lists:
        _coarse(scratch)
        _centres(store, modality, kind, scratch)
    _trained(store, modality, kind, scratch)

    def report(done: int) -> None:
        if on_progress:
            on_progress(done, len(store), index=modality, kind=kind.name)

    elsewhere = (workers > 1 or engine == "ray") and kind.knob != "efSearch"  # a graph cannot be merged
    size = len(store) if kind.knob == "efSearch" else min(PART, -(-len(store) // workers))
    folder = Path(os.path.abspath(store.folder)) if elsewhere else None
    edges = [*range(0, len(store), size), len(store)]
    parts = [Part(folder, modality, kind, scratch, *pair) for pair in itertools.pairwise(edges)]
    if len(parts) == 1 and not elsewhere:
        codes, refine = _filled(store, parts[0], report)
    else:
        waiting = [part for part in parts if not part.done]
        done = len(store) - sum(map(len, waiting))
        if elsewhere:
            for part in spread(make_part, waiting, workers, engine):
                done += len(part)
                report(done)
        else:
            for part in waiting:
                _save_part(store, part, lambda rows, before=done: report(before + rows))
                done += len(part)
        codes, refine = _merged(parts)
    _assemble(kind, codes, refine, scratch, path)
    for part in parts:
        part.remove()
    return path


@dataclass(frozen=True)
class Part:
    """A range of rows of one index, and where its files are."""

    folder: Path | None  # the embeddings, for a process that has not opened them
    modality: str
    kind: Kind
    scratch: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def codes(self) -> Path:
        return self.scratch / f"{_slug(self.kind)}.{self.start}-{self.stop}.codes"

    @property
    def refine(self) -> Path:
        return self.codes.with_suffix(".refine")

    @property
    def done(self) -> bool:
        return self.codes.exists()  # written last

    def remove(self) -> None:
        self.codes.unlink(missing_ok=True)
        self.refine.unlink(missing_ok=True)


def make_part(part: Part) -> Part:
    """Write one part; what a worker process does."""
    store = EmbeddingStore(part.folder, read_manifest(part.folder, "embeddings"))
    _save_part(store, part)
    return part


def spread(work: Callable[[Part], Part], parts: Sequence[Part], workers: int, engine: str) -> Iterator[Part]:
    """work(part) for every part, by processes of this machine or tasks of a Ray cluster; yields them as they finish."""
    if engine == "ray":
        yield from _by_ray(work, parts)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    threads = max(1, faiss.omp_get_max_threads() // workers)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_become_worker, initargs=(threads,))
    try:
        with _deaf_to_ctrl_c():
            futures = [pool.submit(work, part) for part in parts]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was ended from outside (out of memory?); run the command again to go on, "
            "or with fewer --workers"
        ) from error
    except BaseException:  # Ctrl-C, SIGTERM, or what one of them raised: the parts that the others are at come again
        for process in list(pool._processes.values()):  # Python 3.14 has terminate_workers()
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started in here do not hear Ctrl-C, which in a terminal reaches all: who started them answers it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _by_ray(work: Callable[[Part], Part], parts: Sequence[Part]) -> Iterator[Part]:
    ray = ray_or_refuse()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # joins the cluster that RAY_ADDRESS or `ray start` names, else starts one here
    waiting = [ray.remote(work).options(num_cpus=1).remote(part) for part in parts]
    while waiting:
        ready, waiting = ray.wait(waiting)
        try:
            made = ray.get(ready)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # Ray's own error holds the whole traceback
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            raise
        yield from made


def ray_or_refuse() -> Any:
    """The module; UserError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'unclip[ray]'") from error
    return ray


def _become_worker(threads: int) -> None:
    """Use that many threads, and end when the process that started us ends, however it ends."""
    from multiprocessing import parent_process

    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    parent = parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _sample(store: Rows, modality: str, most: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    few = len(store) <= most
    return np.arange(len(store)) if few else np.sort(rng.choice(len(store), most, replace=False))


def _centres(store: Rows, modality: str, kind: Kind, scratch: Path) -> np.ndarray:
    """(lists, D) float32 unit rows."""
    path = scratch / f"centres{kind.lists}.npy"
    if not path.exists():
        wanted = _sample(store, modality, min(SAMPLE, ROWS_PER_LIST * kind.lists))
        sample = torch.empty((len(wanted), store.dim), dtype=_coarse(scratch))
        for low in range(0, len(wanted), BLOCK):
            some = rows_of(store, modality, wanted[low : low + BLOCK])
            sample[low : low + len(some)] = torch.from_numpy(some)
        _save_array(path, k_means(sample, kind.lists).numpy())
    return load_array(path)


def k_means(sample: torch.Tensor, count: int, rounds: int = ROUNDS) -> torch.Tensor:
    """(count, D) float32 unit rows: centres of the (S, D) unit rows, each the direction of the sum of its rows.

    Spherical k-means: rows belong to the centre of largest inner product, in the precision of the sample: which of two
    centres that are nearly alike gets a row does not matter. A centre without rows moves beside the fullest one.
    """
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))[:count]
    centres = sample[order].float()
    for _ in range(rounds):
        owner = nearest(sample, centres.to(sample.dtype))
        counts = owner.bincount(minlength=count)
        sums = torch.zeros_like(centres)
        for some, own in zip(sample.split(BLOCK), owner.split(BLOCK), strict=True):
            sums.index_add_(0, own, some.float())
        empty = (counts == 0).nonzero()[:, 0]
        fullest = counts.argsort(descending=True)[: len(empty)]
        nudge = torch.linspace(-1, 1, centres.shape[1]).sin() * 0.01
        sums[empty] = centres[fullest] + nudge
        lengths = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        centres = torch.where(lengths > 0, sums / lengths, centres)
    return centres


def nearest(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(N,) int64: for each of the (N, D) rows, the centre of the largest inner product, in the centres' precision."""
    if not len(rows):
        return torch.empty(0, dtype=torch.int64)
    return torch.cat([torch.mm(some.to(centres.dtype), centres.T).max(dim=1).indices for some in rows.split(4096)])


def _owners(store: Rows, part: Part, rows: np.ndarray, start: int) -> np.ndarray:
    """(n,) int64, the centre of each of these rows, which start at row `start`; computed once for all kinds."""
    lists = part.kind.lists
    path = part.scratch / f"owners{lists}.{start}-{start + len(rows)}.npy"
    if not path.exists():
        centres = torch.from_numpy(load_array(part.scratch / f"centres{lists}.npy")).to(_coarse(part.scratch))
        _save_array(path, nearest(torch.from_numpy(rows), centres).numpy().astype(np.int32))
    return load_array(path).astype(np.int64)


def _trained(store: Rows, modality: str, kind: Kind, scratch: Path) -> None:
    """Write the empty indexes of a kind: its codes, and what refines them."""
    path = scratch / f"{_slug(kind)}.empty"
    if path.exists():
        return
    rows = rows_of(store, modality, _sample(store, modality, TRAINING))
    if kind.refine:
        refine = faiss.index_factory(store.dim, kind.refine, faiss.METRIC_INNER_PRODUCT)
        refine.train(rows)
        write_index(refine, scratch / f"{_slug(kind)}.empty-refine")
    centres = load_array(scratch / f"centres{kind.lists}.npy") if kind.lists else None
    if kind.rotate:
        turn = faiss.OPQMatrix(store.dim, kind.rotate)
        turn.niter, turn.niter_pq, turn.max_train_points = 10, 4, TRAINING
        short = faiss.ProductQuantizer(store.dim, kind.rotate, 4)
        short.cp.min_points_per_centroid = 1  # or faiss prints a warning for each sub-vector
        turn.pq = short
        # residuals are what the codes keep, so they are what the rotation is for
        coarse = None if centres is None else torch.from_numpy(centres).to(_coarse(scratch))
        turn.train(rows if coarse is None else rows - centres[nearest(torch.from_numpy(rows), coarse)])
        # faiss has no file of a rotation alone, so it goes into an index that holds nothing
        write_index(faiss.IndexPreTransform(turn, faiss.IndexFlatIP(store.dim)), scratch / f"{_slug(kind)}.rotation")
        rows = turn.apply(rows)
        centres = None if centres is None else turn.apply(centres)
    lists = f"IVF{kind.lists}," if kind.lists else ""
    codes = faiss.index_factory(store.dim, lists + kind.codes.replace("_", ","), faiss.METRIC_INNER_PRODUCT)
    if kind.lists:
        faiss.downcast_index(codes.quantizer).add(centres)  # so that train() leaves it as it is
    if kind.codes.startswith("PQ"):
        codes.do_polysemous_training = False  # of use to another way of searching only, and slow
        codes.pq.cp.min_points_per_centroid = 1
    if kind.knob == "efSearch":
        codes.hnsw.efConstruction = 80
    codes.train(rows)
    write_index(codes, path)


def _filled(store: Rows, part: Part, report: Callable[[int], None] | None = None) -> tuple[faiss.Index, Any]:
    """The codes of a part, and what refines them (None if nothing does)."""
    base = part.scratch / _slug(part.kind)
    codes = read_stage(Path(f"{base}.empty"))
    refine = read_stage(Path(f"{base}.empty-refine")) if part.kind.refine else None
    owner, turn = _rotation(part.kind, part.scratch) if part.kind.rotate else (None, None)
    for low in range(part.start, part.stop, BLOCK):
        rows = rows_of(store, part.modality, range(low, min(low + BLOCK, part.stop)))
        if refine is not None:
            refine.add(rows)
        if part.kind.lists:
            owners = _owners(store, part, rows, low)
            rows = rows if turn is None else turn.apply(rows)
            ids = np.arange(low, low + len(rows))
            codes.add_core(len(rows), *(faiss.swig_ptr(array) for array in (rows, ids, owners)))
        else:
            codes.add(rows)
        if report:
            report(low + len(rows) - part.start)
    return codes, refine


def _save_part(store: Rows, part: Part, report: Callable[[int], None] | None = None) -> None:
    codes, refine = _filled(store, part, report)
    if refine is not None:
        write_index(refine, part.refine)
    write_index(codes, part.codes)


def _merged(parts: Iterable[Part]) -> tuple[faiss.Index, Any]:
    """The parts as one, in the order of their rows."""
    first, *others = parts
    codes = read_stage(first.codes)
    refine = read_stage(first.refine) if first.kind.refine else None
    for part in others:
        codes.merge_from(read_stage(part.codes), 0)  # ids are those of the whole already
        if refine is not None:
            refine.merge_from(read_stage(part.refine), 0)
    return codes, refine


def _assemble(kind: Kind, codes: faiss.Index, refine: Any, scratch: Path, path: Path) -> None:
    """Write the index as it is searched: codes packed for fast scan, after the rotation, below the refinement."""
    keep = [codes]  # faiss's wrappers do not all hold what they wrap
    if kind.packed:
        packed = faiss.IndexIVFRaBitQFastScan if kind.codes == "RaBitQ" else faiss.IndexIVFPQFastScan
        keep.append(packed(codes))
    if kind.rotate:
        rotation, turn = _rotation(kind, scratch)
        keep += [rotation, faiss.IndexPreTransform(turn, keep[-1])]
    if refine is not None:
        keep += [refine, faiss.IndexRefine(keep[-1], refine)]
    write_index(keep[-1], path)


def _rotation(kind: Kind, scratch: Path) -> tuple[faiss.Index, Any]:
    """A trained rotation, and the empty index that owns it."""
    owner = read_stage(scratch / f"{_slug(kind)}.rotation")
    return owner, faiss.downcast_VectorTransform(owner.chain.at(0))


def _coarse(scratch: Path) -> torch.dtype:
    """In which rows are compared with centres: measured once, by the process that builds, and the same for all."""
    path = scratch / "precision"
    if not path.exists():
        write_file(path, b"bfloat16" if bfloat16_is_faster() else b"float32")
    return torch.bfloat16 if path.read_bytes() == b"bfloat16" else torch.float32


def _slug(kind: Kind) -> str:
    return kind.name.replace(",", "_").replace("(", "_").replace(")", "")


def read_stage(path: Path) -> faiss.Index:
    """An index in the scratch folder."""
    try:
        return faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{path} is damaged; remove {path.parent}/ and run the command again") from error


def load_array(path: Path) -> np.ndarray:
    """An array in the scratch folder."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged; remove {path.parent}/ and run the command again") from error


def write_index(index: faiss.Index, path: Path) -> None:
    """Whole or not at all; a killed run's half goes when the workspace is opened again."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:  # faiss's own files do not notice if their last 4 kB find no room
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        why = re.sub(r".*Error: '.*?' failed:?", "", why)  # not where in faiss
        raise UserError(f"cannot write {path}: {why.strip()[:200]}") from error
    os.replace(temporary, path)


def _save_array(path: Path, array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    write_file(path, file.getvalue())
