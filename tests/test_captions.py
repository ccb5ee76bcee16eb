import dataclasses
import json
import os

import numpy as np
import pytest
import tiny
import torch

from clip_train.captions import CaptionedBatches, CaptionTable, pick_caption, text_id, uniform_of
from clip_train.model import Clip
from clip_train.pictures import Batches, Pictures
from clip_train.settings import UserError
from clip_train.shards import ShardSet, write_shards


@pytest.fixture
def clip(tmp_path):
    return Clip.load(tiny.clip(tmp_path / "clip"))


def shares(count, mix):
    """How often each of `count` captions is drawn, by an even grid of draws."""
    grid = (np.arange(1200) + 0.5) / 1200
    return np.bincount(pick_caption(np.full(1200, count), mix, grid), minlength=count) / 1200


@pytest.mark.parametrize(
    "count, mix, expected",
    [
        (3, (), [1 / 3, 1 / 3, 1 / 3]),
        (1, (0.2, 0.8), [1]),
        (2, (0.25, 0.75), [0.25, 0.75]),
        (4, (0.4, 0.6), [0.4, 0.2, 0.2, 0.2]),  # the last weight is shared by all further captions
        (2, (1, 1, 2), [0.5, 0.5]),  # it lacks the third caption: the first two divide all
        (3, (3,), [1 / 3, 1 / 3, 1 / 3]),
        (2, (0, 1), [0, 1]),
        (1, (0, 1), [1]),  # it has no caption that is wanted: the one it has
        (2, (0, 0, 1), [0.5, 0.5]),
    ],
)
def test_a_caption_is_drawn_as_often_as_the_mix_says(count, mix, expected):
    assert shares(count, mix) == pytest.approx(expected)


def test_samples_with_different_numbers_of_captions_are_drawn_side_by_side():
    count, uniform = np.array([1, 4, 2, 4]), np.array([0.999999, 0.39, 0.41, 0.999999])
    assert pick_caption(count, (0.4, 0.6), uniform).tolist() == [0, 0, 1, 3]


@pytest.mark.parametrize("mix", [(0,), (-1, 2), (float("nan"), 1), (float("inf"),)])
def test_a_mix_that_makes_no_sense_is_refused(tmp_path, clip, mix):
    with pytest.raises(UserError, match="--caption-mix .*: expected weights >= 0"):
        CaptionTable(ShardSet(tiny.shards(tmp_path / "s")), clip, mix=mix)


def test_draws_are_uniform_and_those_of_one_seed_are_not_those_of_another_moved_along():
    draws = uniform_of(0, np.arange(100_000))
    assert 0 <= draws.min() and draws.max() < 1
    assert np.histogram(draws, 10, (0, 1))[0] == pytest.approx(np.full(10, 10_000), rel=0.05)
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.02
    assert not np.isin(uniform_of(1, np.arange(1000)), draws).any()
    assert uniform_of(0, np.array([7, 3])).tolist() == draws[[7, 3]].tolist()


def test_ids_tell_texts_apart_but_not_their_case():
    assert text_id("A Red Fox") == text_id("a red fox") != text_id("a red fox ")
    assert len({text_id(f"caption {n}") for n in range(10_000)}) == 10_000


@pytest.mark.parametrize("kept", [False, True])
def test_every_caption_of_a_sample_comes_round_and_its_ids_say_what_is_right(tmp_path, clip, kept):
    table = CaptionTable(ShardSet(tiny.shards(tmp_path / "s")), clip, cache=tmp_path / "cache" if kept else None)
    drawn = table.pick(np.array([3] * 200), np.random.default_rng(0).random(200))
    expected = {tuple(t.tolist()): text_id(c) for c in ("picture number 3", "one of many") for t in clip.tokenize([c])}
    seen = {(tuple(t.tolist()), c) for t, c in zip(drawn["tokens"], drawn["caption"].tolist(), strict=True)}
    assert seen == set(expected.items())
    assert set(drawn["group"].tolist()) == {text_id("label 1")}
    # labels: samples 2i and 2i + 1 share one; the caption that all samples share has one id
    assert [table.group.tolist().index(g) for g in table.group.tolist()] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert len(table.caption.unique()) == 11


def test_a_sample_without_a_label_is_grouped_by_its_first_caption(tmp_path, clip):
    rows = [
        dataclasses.replace(s, captions=["Same" if i < 2 else f"c{i}"], meta={}) for i, s in enumerate(tiny.samples(4))
    ]
    write_shards(rows, tmp_path / "s")
    group = CaptionTable(ShardSet(tmp_path / "s"), clip).group.tolist()
    assert group == [text_id(c) for c in ("same", "same", "c2", "c3")]


def test_the_label_cls_is_the_file_of_that_name(tmp_path, clip):
    samples = ShardSet(tiny.with_cls(tmp_path / "s"))
    assert [samples.label(i, "cls") for i in range(5)] == ["7", "7", "3", "in the json", None]
    group = CaptionTable(samples, clip, label_field="cls").group.tolist()
    assert group == [text_id(label) for label in ("7", "7", "3", "in the json", "caption 4")]


def test_the_table_is_made_once_and_belongs_to_shards_tokenizer_and_label(tmp_path, clip, monkeypatch):
    samples = ShardSet(tiny.shards(tmp_path / "s"))
    first = CaptionTable(samples, clip, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(ShardSet, "about", None)  # reading a caption would fail
        again = CaptionTable(samples, clip, mix=(1, 2), cache=tmp_path / "cache")
        assert np.array_equal(first.tokens, again.tokens) and torch.equal(first.caption, again.caption)
    assert first.tokens.dtype == np.uint16
    CaptionTable(samples, clip, "source", cache=tmp_path / "cache")
    CaptionTable(ShardSet(tiny.shards(tmp_path / "t", 12)), clip, cache=tmp_path / "cache")
    monkeypatch.setattr(clip.tokenizer, "context_length", 8)
    assert CaptionTable(samples, clip, cache=tmp_path / "cache").tokens.shape[1] == 8
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("file", ["tokens.bin", "table.json"])
def test_a_table_that_is_damaged_is_made_anew(tmp_path, clip, file):
    samples = ShardSet(tiny.shards(tmp_path / "s"))
    first = np.array(CaptionTable(samples, clip, cache=tmp_path / "cache").tokens)
    [table] = (tmp_path / "cache").iterdir()
    (table / file).write_bytes((table / file).read_bytes()[:-3])
    assert np.array_equal(CaptionTable(samples, clip, cache=tmp_path / "cache").tokens, first)
    assert json.loads((table / "table.json").read_bytes())["tokens"]["shape"] == [20, 16]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_table_tokenised_by_several_processes_is_the_same(tmp_path, clip, monkeypatch):
    samples = ShardSet(tiny.shards(tmp_path / "s"))
    alone = CaptionTable(samples, clip)
    for name, value in (("PIECE", 3), ("WORKER_PAYS", 5)):
        monkeypatch.setattr(f"clip_train.captions.{name}", value)
    monkeypatch.setattr("clip_train.captions.os.cpu_count", lambda: 3)
    seen = []
    helped = CaptionTable(samples, clip, on_progress=lambda done, total: seen.append((done, total)))
    assert np.array_equal(alone.tokens, helped.tokens) and torch.equal(alone.group, helped.group)
    assert seen == [(3, 10), (6, 10), (9, 10), (10, 10)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_goes_wrong_in_a_process_that_tokenises_is_said_in_one_line(tmp_path, clip, monkeypatch):
    samples = ShardSet(tiny.shards(tmp_path / "s"))
    monkeypatch.setattr("clip_train.captions.WORKER_PAYS", 5)
    monkeypatch.setattr("clip_train.captions.os.cpu_count", lambda: 2)
    os.utime(samples.paths[0], (0, 0))
    with pytest.raises(UserError) as caught:
        CaptionTable(samples, clip)
    assert str(caught.value) == f"{samples.paths[0]} changed while it was being used; run the same command again"


def test_a_table_that_cannot_be_written_is_one_line(tmp_path, clip):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot write .*cache"):
        CaptionTable(ShardSet(tiny.shards(tmp_path / "s")), clip, cache=tmp_path / "cache")


def test_the_batch_of_a_step_is_the_same_whether_training_began_there_or_not(tmp_path, clip):
    samples = ShardSet(tiny.shards(tmp_path / "s"))
    batches = CaptionedBatches(Batches(Pictures(samples, 16), 4, seed=1), CaptionTable(samples, clip), seed=1)
    from_start, from_five = batches(0), batches(5)
    for _ in range(5):
        next(from_start)
    one, other = next(from_start), next(from_five)
    assert one.keys() == {"pixels", "tokens", "caption", "group"}
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_several_ranks_draw_the_captions_that_one_alone_would(tmp_path, clip):
    samples = ShardSet(tiny.shards(tmp_path / "s"))
    pictures, table = Pictures(samples, 16), CaptionTable(samples, clip)
    alone = CaptionedBatches(Batches(pictures, 6, seed=2), table, 2)(0)
    ranks = [CaptionedBatches(Batches(pictures, 2, 2, rank=r, world=3), table, 2)(0) for r in range(3)]
    for _ in range(4):
        one, parts = next(alone), [next(r) for r in ranks]
        assert all(torch.equal(one[name], torch.cat([part[name] for part in parts])) for name in one)
