import contextlib
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import crew
import faiss
import numpy as np
import pytest
import tiny
import torch

from clip_train.folder import read_manifest
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from retrieval import build as module
from retrieval import index, tune
from retrieval.build import build, k_means, nearest
from retrieval.index import build_index, load_index
from retrieval.kinds import Kind, available

DIM = 32
KINDS = [
    Kind("SQ8", 30),
    Kind("PQ8x4", 30, "SQ8"),
    Kind("RaBitQ", 30, "SQ6"),
    Kind("PQ8x4", 30, "SQ8", 8),
    Kind("Flat"),
]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build") / "emb"
    tiny.store(folder, tiny.unit_rows(3000, DIM), tiny.unit_rows(3000, DIM, seed=1), parts=4)
    return folder


def answers(path, nprobe=8):
    index = faiss.read_index(str(path))
    inner = index
    if hasattr(index, "base_index"):
        index.k_factor, inner = 4, faiss.downcast_index(index.base_index)
    ivf = faiss.try_extract_index_ivf(inner)
    if ivf is not None:
        ivf.nprobe = nprobe
    return index.search(tiny.unit_rows(100, DIM, seed=9), 10)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_index_merged_from_parts_answers_as_one_built_at_once(kind, embeddings, tmp_path, monkeypatch):
    if not available(kind, DIM):
        pytest.skip("this faiss does not make it")
    store = EmbeddingStore.open(embeddings)
    whole = build(store, "image", kind, tmp_path / "whole")
    monkeypatch.setattr(module, "PART", 700)
    monkeypatch.setattr(module, "BLOCK", 300)
    parts = build(store, "image", kind, tmp_path / "parts")
    np.testing.assert_array_equal(answers(parts)[1], answers(whole)[1])
    np.testing.assert_array_equal(answers(parts)[0], answers(whole)[0])
    assert not list((tmp_path / "parts").glob("*-*.codes"))


def test_an_index_built_by_two_processes_answers_as_one_built_by_one(embeddings, tmp_path):
    store = EmbeddingStore.open(embeddings)
    kind = Kind("PQ8x4", 30, "SQ8")
    one = build(store, "text", kind, tmp_path / "one")
    seen = []
    two = build(
        store,
        "text",
        kind,
        tmp_path / "two",
        workers=2,
        on_progress=lambda done, total, **_: seen.append((done, total)),
    )
    np.testing.assert_array_equal(answers(two)[1], answers(one)[1])
    assert seen[-1] == (3000, 3000) and len(seen) == 2


def test_finished_parts_are_not_made_again(embeddings, tmp_path, monkeypatch):
    store, kind, made = EmbeddingStore.open(embeddings), Kind("SQ8", 30), []
    monkeypatch.setattr(module, "PART", 1000)
    plain = module._save_part

    def stop_at_the_third(store, part, *rest):
        if part.start == 2000 and len(made) < 3:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(part.start)
        plain(store, part, *rest)

    monkeypatch.setattr(module, "_save_part", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build(store, "image", kind, tmp_path)
    path = build(store, "image", kind, tmp_path)
    assert made == [0, 1000, "stopped", 2000]
    assert faiss.read_index(str(path)).ntotal == 3000


def test_kinds_with_the_same_lists_share_centres_and_owners(embeddings, tmp_path, monkeypatch):
    store = EmbeddingStore.open(embeddings)
    build(store, "image", Kind("SQ8", 30), tmp_path)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(module, "k_means", never)
    monkeypatch.setattr(module, "nearest", never)
    build(store, "image", Kind("PQ8x4", 30, "SQ8"), tmp_path)
    with pytest.raises(AssertionError):
        build(store, "image", Kind("SQ8", 31), tmp_path)


def test_k_means_finds_clusters_that_lie_apart_and_leaves_no_centre_empty():
    truth = tiny.unit_rows(12, 64)
    noise = 0.02 * np.random.default_rng(3).standard_normal((600, 64)).astype(np.float32)
    rows = torch.nn.functional.normalize(torch.from_numpy(np.repeat(truth, 50, axis=0) + noise))
    centres = k_means(rows, 12)
    assert len(nearest(rows, centres).unique()) == 12
    assert float((rows * centres[nearest(rows, centres)]).sum(1).mean()) > 0.85
    same = k_means(torch.nn.functional.normalize(torch.ones(40, 8)), 3)
    torch.testing.assert_close(torch.linalg.vector_norm(same, dim=1), torch.ones(3))


def test_more_rows_than_a_block_are_never_in_memory_at_once(tmp_path, monkeypatch):
    """As numpy counts it: 40,000 rows of 256 are 41 MB as float32, a block of 2,000 is 2 MB."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((40_000, 256), dtype=np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    tiny.store(tmp_path / "emb", image, parts=3)
    monkeypatch.setattr(module, "BLOCK", 2000)
    monkeypatch.setattr(module, "SAMPLE", 4000)
    monkeypatch.setattr(module, "TRAINING", 2000)
    store = EmbeddingStore.open(tmp_path / "emb")
    tracemalloc.start()
    try:
        build(store, "image", Kind("SQ8", 50), tmp_path / "scratch")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2 * 2000 * 256 < peak < 12e6


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_a_served_index_stays_on_disk_until_it_is_asked(tmp_path):
    """Resident memory grows by less than half of the file when an index is opened and asked once."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40_000, 256), dtype=np.float32)
    index = faiss.index_factory(256, "IVF100,SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(rows[:5000])
    index.add(rows)
    faiss.write_index(index, str(tmp_path / "image.index"))

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    served = load_index(tmp_path)
    served.search(rows[:1], 10)
    assert resident() - before < 0.5 * (tmp_path / "image.index").stat().st_size


@pytest.mark.filterwarnings("ignore")
def test_an_index_built_by_ray_answers_as_one_built_here(embeddings, tmp_path):
    ray = pytest.importorskip("ray")
    store, kind = EmbeddingStore.open(embeddings), Kind("SQ8", 30)
    here = build(store, "image", kind, tmp_path / "here")
    try:
        there = build(store, "image", kind, tmp_path / "there", workers=2, engine="ray")
    finally:
        ray.shutdown()
    np.testing.assert_array_equal(answers(there)[1], answers(here)[1])


def test_ray_that_is_not_installed_is_one_line(embeddings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="needs Ray: pip install 'unclip.ray.'"):
        build(EmbeddingStore.open(embeddings), "image", Kind("SQ8", 30), tmp_path, workers=2, engine="ray")


def test_what_a_user_can_mend_comes_out_of_a_task_of_ray_as_one_line(tmp_path, monkeypatch):
    class RayTaskError(Exception):
        cause = UserError("cannot write parts: No space left on device")

    def get(_):
        raise RayTaskError("ray::make_part() (pid=1) Traceback (most recent call last): ...")

    remote = SimpleNamespace(remote=lambda part: part, options=lambda **_: remote)
    ray = SimpleNamespace(
        is_initialized=lambda: True,
        remote=lambda work: remote,
        wait=lambda waiting: (waiting[:1], waiting[1:]),
        get=get,
        exceptions=SimpleNamespace(RayError=RayTaskError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    part = module.Part(tmp_path, "image", KINDS[0], tmp_path, 0, 10)
    with pytest.raises(UserError, match="^cannot write parts: No space left on device$"):
        list(module.spread(module.make_part, [part, part], 2, "ray"))


@pytest.mark.parametrize("first", [True, False], ids=["bfloat16", "float32"])
def test_all_processes_compare_with_centres_in_the_precision_that_the_first_one_measured(
    first, embeddings, tmp_path, monkeypatch
):
    store, kind, seen = EmbeddingStore.open(embeddings), Kind("SQ8", 30), set()
    monkeypatch.setattr(module, "nearest", lambda *given: seen.add(given[1].dtype) or nearest(*given))
    monkeypatch.setattr(module, "bfloat16_is_faster", lambda: first)
    path = build(store, "image", kind, tmp_path)
    for stage in (path, *tmp_path.glob("owners*.npy")):
        stage.unlink()
    monkeypatch.setattr(module, "bfloat16_is_faster", lambda: not first)  # another process, on a busier machine
    build(store, "image", kind, tmp_path)
    assert seen == {torch.bfloat16 if first else torch.float32}


def test_a_file_that_cannot_be_written_is_said_without_the_lines_of_faiss(tmp_path):
    with pytest.raises(UserError) as caught:
        module.write_index(faiss.IndexFlatIP(4), tmp_path / "none" / "i.index")
    assert str(caught.value).startswith(f"cannot write {tmp_path}/none/i.index: No such file or directory")
    assert ".cpp" not in str(caught.value)


BOTH = [Kind("SQ8", 60), Kind("PQ8x4", 60, "SQ8")]  # which one is the faster is not the same each time


def kind_of(path):
    return BOTH[hasattr(faiss.read_index(str(path)), "base_index")]


def index_in_a_child(embeddings, out):
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    module.PART, tune.QUERIES, tune.SECONDS = 800, 60, 0.001
    index.tiers = lambda *_, **__: [BOTH]
    build_index(embeddings, out, recall=0.5)


def test_an_index_killed_at_random_moments_is_finished_by_running_it_again(tmp_path):
    """kill -9 at UNCLIP_KILLS random moments (3); then the index answers as one built unbroken."""
    tiny.store(tmp_path / "emb", tiny.unit_rows(2400, DIM), parts=2)
    store = EmbeddingStore.open(tmp_path / "emb")
    kills, out = int(os.environ.get("UNCLIP_KILLS", "3")), tmp_path / "out"
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "big"))

    def child():
        process = crew._processes.Process(target=index_in_a_child, args=(tmp_path / "emb", out))
        process.start()
        return process

    crew._processes.Process(target=int).start()  # the server that forks them takes its time to start
    child().join()
    os.rename(out, tmp_path / "first")
    began = time.monotonic()
    child().join()
    usual = time.monotonic() - began
    done = [tmp_path / "whole"]
    os.rename(out, done[0])
    killed = 0
    for _ in range(4 * kills):
        process = child()
        process.join(rng.uniform(0, 0.8 * usual))
        killed += process.is_alive()
        process.kill()
        process.join()
        assert out.exists() == (out / "manifest.json").exists()
        if out.exists():  # it was done before the kill: the next one starts anew
            done.append(tmp_path / f"done{len(done)}")
            os.rename(out, done[-1])
        if killed == kills:
            break
    child().join()
    assert killed
    for folder in [out, *done]:
        assert read_manifest(folder, "index").result["rows"] == 2400
        for modality in ("image", "text"):
            assert read_manifest(folder).result[modality]["recall"] >= 0.5
            path = folder / f"{modality}.index"
            same = build(store, modality, kind_of(path), tmp_path / modality)
            for mine, true in zip(answers(path), answers(same), strict=True):
                np.testing.assert_array_equal(mine, true)


STRUCK = """
import os, signal, sys, time


def slow(what):
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal may at any time
    with open(f"at-{os.getpid()}.tmp", "w"):
        os.rename(f"at-{os.getpid()}.tmp", f"at-{os.getpid()}")
    time.sleep(600)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it
    import cli
    from retrieval import build

    build.make_part = slow
    emb, os.environ["MOMENT"] = sys.argv[1:]
    sys.argv = ["unclip", "index", "--embeddings", emb, "--out", "index", "--kind", "flat", "--workers", "2"]
    cli.main()
elif os.environ["MOMENT"] == "starting":
    slow(None)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("moment", ["starting", "working"])
@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_signal_ends_a_build_by_processes_at_once_and_none_is_left(embeddings, tmp_path, number, to_all, moment):
    """to_all: as a terminal sends it, to the workers too."""
    (tmp_path / "struck.py").write_text(STRUCK)
    process = subprocess.Popen(
        [sys.executable, "struck.py", str(embeddings), moment],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(workers := [int(path.name[3:]) for path in tmp_path.glob("at-*[0-9]")]) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, number) if to_all else process.send_signal(number)
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 128 + number
        assert "unclip: stopped" in said and "Traceback" not in said
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(worker, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
