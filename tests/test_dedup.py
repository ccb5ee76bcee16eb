import csv
import shutil

import numpy as np
import pandas as pd
import pytest
import tiny

from clip_train.settings import UserError
from retrieval import changes, dedup, tune
from retrieval.dedup import find_duplicates
from retrieval.index import build_index

DIM = 32


@pytest.fixture(autouse=True)
def measure_briefly(monkeypatch):
    monkeypatch.setattr(tune, "SECONDS", 0.001)
    monkeypatch.setattr(tune, "QUERIES", 200)


def moved(row, cosine, seed):
    """A unit row at exactly this cosine from `row`."""
    away = np.random.default_rng(seed).standard_normal(DIM)
    away -= away @ row * row
    return cosine * row + np.sqrt(1 - cosine**2) * away / np.linalg.norm(away)


def planted():
    """400 rows: unrelated, but for copies, near copies, and a chain whose ends are far apart."""
    rows = tiny.unit_rows(400, DIM, 0).astype(np.float64)
    rows[[10, 20, 30]] = rows[5]  # exact copies of row 5
    rows[100] = moved(rows[50], 0.99, 1)
    rows[101] = moved(rows[50], 0.96, 2)  # not near enough
    for step in range(1, 5):  # 200 .. 204, each 0.985 from the one before, turned in one plane
        angle = step * np.arccos(0.985)
        rows[200 + step] = np.cos(angle) * rows[200] + np.sin(angle) * moved(rows[200], 0.0, 3)
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny.store(root / "emb", planted(), parts=3)
    build_index(root / "emb", root / "index")
    return root


def test_groups_are_the_connected_components_of_the_exact_near_pairs(world):
    found = find_duplicates(world / "index", threshold=0.98)
    groups = [set(found.rows[found.group == g].tolist()) for g in range(found.groups)]
    assert groups == [{200, 201, 202, 203, 204}, {5, 10, 20, 30}, {50, 100}]
    assert found.found is None  # the index is exact


def test_every_row_that_may_go_is_near_one_that_stays_even_in_a_chain(world):
    found = find_duplicates(world / "index", threshold=0.98)
    kept = set(found.rows[found.keeper == found.rows].tolist())
    assert set(found.dropped.tolist()) == {10, 20, 30, 100, 201, 203}
    assert kept == {5, 50, 200, 202, 204}  # of the chain, more than its first
    rows = planted()
    cosine = np.einsum("nd,nd->n", rows[found.rows], rows[found.keeper])
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-3)
    assert (found.cosine >= 0.98).all() and set(found.keeper.tolist()) == kept


def test_the_least_cosine_in_a_group_shows_a_chain(world):
    found = find_duplicates(world / "index", threshold=0.98)
    np.testing.assert_allclose(found.least, [np.cos(4 * np.arccos(0.985)), 1, 0.99], atol=2e-3)


def test_a_higher_threshold_finds_less_and_the_advice_says_how_much(world):
    found = find_duplicates(world / "index", threshold=0.988)
    assert [set(found.rows[found.group == g].tolist()) for g in range(found.groups)] == [{5, 10, 20, 30}, {50, 100}]
    advice = {threshold: rows for threshold, rows, _ in found.advice()}
    assert advice[0.99] in (4, 6) and advice[0.98] == 11 and advice[0.95] == 12
    assert sum(rows for _, rows in found.histogram()) == 400
    assert dict(found.histogram())["0.98 .. 0.99"] + dict(found.histogram())["0.99 .. 1.00"] == 11


def test_more_copies_than_neighbours_are_asked_for_are_one_group(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "NEIGHBOURS", (4, 16, 64))
    rows = tiny.unit_rows(300, DIM, 0)
    rows[:200] = rows[0]
    tiny.store(tmp_path / "emb", rows)
    build_index(tmp_path / "emb", tmp_path / "index")
    found = find_duplicates(tmp_path / "index")
    assert found.groups == 1 and len(found.dropped) == 199


def test_of_many_copies_only_the_first_is_asked_for_ever_more_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "NEIGHBOURS", (4, 16, 64))
    rows = tiny.unit_rows(300, DIM, 0)
    rows[:200] = rows[0]
    tiny.store(tmp_path / "emb", rows)
    build_index(tmp_path / "emb", tmp_path / "index")
    pairs = []
    join = dedup._join
    monkeypatch.setattr(dedup, "_join", lambda parent, i, j: (pairs.append(len(i)), join(parent, i, j)))
    find_duplicates(tmp_path / "index")
    assert 199 <= sum(pairs) < 200 * 16


def test_what_hangs_together_by_pairs_has_one_root_and_it_is_the_lowest(monkeypatch):
    monkeypatch.setattr(dedup, "PAIRS", 7)
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, 200, (2, 120))
    parent, label = np.arange(200), np.arange(200)
    dedup._join(parent, i, j)
    for _ in range(200):  # the lowest number spreads along the pairs
        lowest = np.minimum(label[i], label[j])
        np.minimum.at(label, i, lowest)
        np.minimum.at(label, j, lowest)
    np.testing.assert_array_equal(dedup._roots(parent, np.arange(200)), label)


def test_an_approximate_index_is_checked_on_the_vectors_and_says_what_share_it_found(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.repeat(tiny.unit_rows(60, DIM, 0), 100, axis=0) + 0.1 * rng.standard_normal((6000, DIM))
    rows[3000:3500] = rows[:500] + 0.005 * rng.standard_normal((500, DIM))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    tiny.store(tmp_path / "emb", rows)
    build_index(tmp_path / "emb", tmp_path / "index", kind="ivf", recall=0.9)
    found = find_duplicates(tmp_path / "index", threshold=0.99)
    near = np.triu(rows @ rows.T >= 0.99, 1)
    assert near.sum() == 500
    assert found.found > 0.95 and len(found.dropped) >= 0.95 * 500 and set(found.dropped) <= set(range(3000, 3500))


def test_what_may_go_is_a_list_that_delete_takes_and_then_nothing_is_left(world, tmp_path):
    shutil.copytree(world, tmp_path / "w")
    index = tmp_path / "w" / "index"
    found = find_duplicates(index, threshold=0.98)
    found.save_keys(tmp_path / "drop.txt")
    keys = (tmp_path / "drop.txt").read_text().split()
    assert changes.delete(index, keys).deleted == 6
    assert find_duplicates(index, threshold=0.98).dropped.size == 0


def test_the_table_is_written_as_parquet_and_as_csv(world, tmp_path):
    found = find_duplicates(world / "index", threshold=0.98)
    found.save(tmp_path / "groups.parquet")
    found.save(tmp_path / "groups.csv")
    frame = pd.read_parquet(tmp_path / "groups.parquet")
    assert list(frame.columns) == ["key", "group", "keeper", "cosine", "least"]
    assert frame[frame["group"] == 1]["keeper"].tolist() == ["k00005"] * 4
    with open(tmp_path / "groups.csv") as file:
        assert [line["key"] for line in csv.DictReader(file)] == frame["key"].tolist()
    with pytest.raises(UserError, match="written as .parquet or .csv"):
        found.save(tmp_path / "groups.xlsx")


def test_captions_are_compared_when_they_are_asked_for(tmp_path):
    text = tiny.unit_rows(20, DIM, 1)
    text[7] = text[3]
    tiny.store(tmp_path / "emb", tiny.unit_rows(20, DIM, 0), text)
    build_index(tmp_path / "emb", tmp_path / "index")
    assert find_duplicates(tmp_path / "index").groups == 0
    assert find_duplicates(tmp_path / "index", modality="text").rows.tolist() == [3, 7]


def test_the_row_with_the_largest_number_in_a_column_is_kept(world, monkeypatch):
    from retrieval.live import LiveTable

    column = LiveTable.column
    widths = {10: 640.0, 20: None, 30: float("nan"), 100: 10**6}
    monkeypatch.setattr(
        LiveTable,
        "column",
        lambda self, name: [widths.get(row, 64) for row in range(400)] if name == "width" else column(self, name),
    )
    found = find_duplicates(world / "index", threshold=0.98, prefer="width")
    assert dict(zip(found.rows.tolist(), found.keeper.tolist(), strict=True))[5] == 10
    assert 50 in found.dropped and 100 not in found.dropped
    with pytest.raises(UserError, match="--keep caption: no row of .* has a number in such a column"):
        find_duplicates(world / "index", prefer="caption")


def test_the_sheet_shows_the_doubtful_groups_first(world):
    sheet = find_duplicates(world / "index", threshold=0.98).sheet(groups=3)
    assert sheet.width > 300 and sheet.height > 200  # the pictures themselves are gone: cells with keys


def test_a_threshold_that_is_no_cosine_is_refused(world):
    with pytest.raises(UserError, match="--threshold 95 must be above 0 and at most 1"):
        find_duplicates(world / "index", threshold=95)


def test_the_command_line_writes_table_list_and_sheet_and_says_what_to_do_next(world, tmp_path, monkeypatch):
    import json

    from click.testing import CliRunner

    import cli

    monkeypatch.chdir(tmp_path)
    words = ["dedup", "--index", str(world / "index"), "--out", "g.csv", "--drop", "drop.txt", "--sheet", "near.png"]
    done = CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    figures = json.loads(done.stdout)
    assert figures["threshold"] == 0.98 and figures["dropped"] == 6 and figures["chains"] == 1
    assert "3 groups, 6 rows may go; 1 groups are chains" in done.stderr
    assert f"next: unclip index delete --index {world / 'index'} --keys drop.txt" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"g.csv", "drop.txt", "near.png"}
