"""Several processes that embed into one folder; what they write must be what one of them writes."""

import dataclasses
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import tiny
import torch

from clip_train import engines
from clip_train.embed import embed
from clip_train.engines import Share
from clip_train.folder import partial_of
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import write_shard, write_shards
from clip_train.store import EmbeddingStore

_processes = multiprocessing.get_context("forkserver")  # torch is loaded there once, see crew.py
_processes.set_forkserver_preload(["open_clip", "pytest", "clip_train.engines", "pyarrow.parquet", "pandas"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards with a bad picture, a shard of nothing else, an empty tar, and what one process makes of them."""
    root = tmp_path_factory.mktemp("made")
    samples = tiny.samples(22)
    for i in (5, 8, 9):
        samples[i] = Sample(key=samples[i].key, image=b"none", ext="png", captions=["x"], meta={"width": 1})
    write_shards(samples, root / "shards", samples_per_shard=2)
    write_shard([], root / "shards" / "000003-empty.tar")
    tiny.clip(root / "clip")
    run(root, root / "emb")
    return root


def run(root, out, **options):
    torch.set_num_threads(1)
    return embed(root / "shards", root / "clip", out, batch_size=2, precision="fp32", **options)


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def test_two_processes_write_what_one_writes_bit_for_bit(made, tmp_path):
    told = []
    manifest = run(made, tmp_path / "emb", workers=2, on_progress=lambda *a, **n: told.append((a[0], n["bad"])))
    assert files_of(tmp_path / "emb") == files_of(made / "emb")
    assert manifest.result["rows"] == 19 and manifest.result["bad"] == 3
    assert told[0] == (0, 0) and told[-1] == (22, 3) and told == sorted(told)
    assert "s005" in (tmp_path / "emb" / "bad.csv").read_text()


def test_a_worker_that_is_killed_is_named_and_nothing_it_finished_is_lost(made, tmp_path, monkeypatch):
    def kill_one(done, *_, **__):
        if done >= 8:  # of two workers, each with a shard of two samples
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(UserError, match="worker process was killed.*--workers"):
        run(made, tmp_path / "emb", workers=2, on_progress=kill_one)
    assert not multiprocessing.active_children()
    told = []
    run(made, tmp_path / "emb", on_progress=lambda done, total, **numbers: told.append(done))
    assert told[0] > 0 and files_of(tmp_path / "emb") == files_of(made / "emb")


def test_what_goes_wrong_in_a_worker_keeps_its_own_words(made, tmp_path):
    plain = dataclasses.replace(_recipe(made, tmp_path), fingerprint="sha256:another")
    with pytest.raises(UserError, match="changed while it was being used"):
        engines.make_in_processes([_shard(made)], plain, 1, None, print)


def _recipe(made, folder):
    from clip_train.part import Recipe

    return Recipe(
        clip=str(made / "clip"), fingerprint="", preprocess_cfg={}, precision={}, device="cpu", batch_size=2,
        compile=False, folder=str(folder), parts=1,
    )  # fmt: skip


def _shard(made):
    from clip_train.part import Shard

    return Shard(part=0, tar=str(made / "shards" / "000000.tar"), count=2, size=0, mtime_ns=0)


# Ranks


def rank(environment, *arguments):
    """One of several processes that torchrun or a SLURM array starts; its exit code is 10 if it published."""
    os.environ.update(environment)
    raise SystemExit(10 if run(*arguments, engine="ranks") else 0)


def start(*arguments):
    process = _processes.Process(target=rank, args=arguments)
    process.start()
    return process


def ended(*processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_ranks_share_the_shards_and_whoever_is_last_publishes(made, tmp_path):
    codes = ended(*[start({"RANK": str(r), "WORLD_SIZE": "3"}, made, tmp_path / "emb") for r in range(3)])
    assert set(codes) <= {0, 10} and 10 in codes  # one that comes when all is there finds it done
    assert files_of(tmp_path / "emb") == files_of(made / "emb")
    assert not partial_of(tmp_path / "emb").exists()


def test_a_slurm_array_may_run_one_task_after_the_other_and_a_plain_run_finishes_what_failed(made, tmp_path):
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "3"}
    for task in ("1", "3"):  # 2 never ran
        assert ended(start(array | {"SLURM_ARRAY_TASK_ID": task}, made, tmp_path / "emb")) == [0]
    assert not (tmp_path / "emb").exists()
    told = []
    run(made, tmp_path / "emb", on_progress=lambda *a, **n: told.append(n["resumed"]))
    assert told[0] == 8 and files_of(tmp_path / "emb") == files_of(made / "emb")


@pytest.mark.parametrize(
    "environment, share",
    [
        ({}, Share(rank=0, ranks=1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Share(rank=2, ranks=4)),
        (
            {"SLURM_ARRAY_TASK_ID": "70", "SLURM_ARRAY_TASK_COUNT": "8"}
            | {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "70"},  # --array=0-70:10
            Share(rank=7, ranks=8),
        ),
        (
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "1"}
            | {"SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "5"},
            Share(rank=0, ranks=1),
        ),
    ],
)
def test_the_environment_says_which_share_is_ours(environment, share):
    assert Share.of(environment) == share


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK 4 must be"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "make no sense"),
        ({"SLURM_ARRAY_TASK_COUNT": "4"}, "make no sense: 'SLURM_ARRAY_TASK_ID'"),
        (
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "3"}
            | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "9"},  # --array=1,3,9
            "must be a range",
        ),
    ],
)
def test_an_environment_that_contradicts_itself_is_one_line(environment, words):
    with pytest.raises(UserError, match=words):
        Share.of(environment)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_every_shard_is_the_share_of_exactly_one_rank(ranks):
    owners = [[Share(rank=r, ranks=ranks).has(part) for r in range(ranks)] for part in range(20)]
    assert np.array(owners).sum(1).tolist() == [1] * 20


# Killed


def killed_at_random(made, out, times, seed, **environment):
    """Embed again and again in processes that are killed after a random time; returns how many were."""
    rng, killed, alone = random.Random(seed), 0, 0.0
    for _ in range(times):
        began = time.monotonic()
        process = start(environment, made, out)
        if alone:  # at any time of what is left to do, its first tenth of a second for the start
            process.join(rng.uniform(0, 1.1 * alone))
        else:
            while not partial_of(out).exists():
                time.sleep(0.005)
            process.join(rng.uniform(0, 0.2))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        alone = max(alone, time.monotonic() - began)
        if out.exists():
            break
    return killed


def test_killed_at_random_moments_nothing_is_lost_and_nothing_doubled(made, tmp_path):
    assert killed_at_random(made, tmp_path / "emb", 3, seed=0) >= 1
    run(made, tmp_path / "emb")
    assert files_of(tmp_path / "emb") == files_of(made / "emb")
    store = EmbeddingStore.open(tmp_path / "emb")
    assert store.keys == [f"s{i:03d}" for i in range(22) if i not in (5, 8, 9)]


def test_a_precision_that_is_none_or_not_for_this_device_is_refused_before_anything_is_written(made, tmp_path):
    for precision, words in (("bf17", "no precision 'bf17'; use one of: auto"), ("fp16", "needs a CUDA GPU")):
        with pytest.raises(UserError, match=words):
            embed(made / "shards", made / "clip", tmp_path / "emb", precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_ray_that_is_not_installed_is_named_with_its_extra(made, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'unclip\[ray\]'"):
        run(made, tmp_path / "emb", engine="ray")


def test_an_engine_of_another_name_is_refused_by_name(made, tmp_path):
    with pytest.raises(UserError, match="no engine 'spark'; use one of: local, ranks, ray"):
        run(made, tmp_path / "emb", engine="spark")


@pytest.mark.filterwarnings("ignore")  # Ray warns about its own internals
def test_ray_writes_what_one_process_writes_bit_for_bit(made, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra: pip install 'unclip[ray]'")
    try:
        run(made, tmp_path / "emb", engine="ray", workers=1)
    finally:
        ray.shutdown()
    assert files_of(tmp_path / "emb") == files_of(made / "emb")


def test_the_local_engine_takes_no_notice_of_an_array_of_other_work(made, tmp_path, monkeypatch):
    from click.testing import CliRunner

    import cli

    for name, value in {"ID": "3", "COUNT": "3", "MIN": "1", "MAX": "7"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    arguments = ["embed", "--shards", str(made / "shards"), "--clip", str(made / "clip"), "--batch-size", "2"]
    arguments += ["--precision", "fp32", "--device", "cpu", "--engine", "local", "--out", str(tmp_path / "emb")]
    assert CliRunner().invoke(cli.cli, arguments, catch_exceptions=False).exit_code == 0
    assert len(EmbeddingStore.open(tmp_path / "emb")) == 19
