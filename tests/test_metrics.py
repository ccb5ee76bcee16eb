import math
from itertools import combinations

import numpy as np
import pytest
import tiny

from clip_train.metrics import (
    brier_score,
    calibration_error,
    chance_rank,
    chance_recall,
    class_recalls,
    log_loss,
    mean_average_precision,
    modality_gap,
    nearest,
    ranks,
    reliability,
    retrieval_recall,
)

# Rows are the axes, so a query's coordinates are its scores.
AXES = np.eye(4)
QUERIES = np.array(
    [
        [0.9, 0.8, 0.1, 0.0],  # order of rows: 0 1 2 3
        [0.5, 0.1, 0.7, 0.6],  # 2 3 0 1
        [0.4, 0.3, 0.2, 0.1],  # 0 1 2 3
    ]
)


def test_ranks_of_a_matrix_worked_by_hand():
    rows = AXES[:3]
    assert ranks(QUERIES, rows).tolist() == [1, 3, 3]
    result = retrieval_recall(QUERIES, rows, ks=(1, 2, 3))
    assert result.recall == {1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3), 3: 1.0}
    assert result.median_rank == 3 and result.queries == 3 and result.rows == 3 and result.right_answers == 1
    assert result.chance == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 3: 1.0}


def test_ranks_with_many_right_answers_worked_by_hand():
    # group a: rows 1 and 3; group b: row 0; group c: row 2
    groups_r = ["b", "a", "c", "a"]
    # query 0 wants a: row 1 comes second, after row 0. Query 1 wants a: row 3 is second, after row 2.
    # Query 2 wants c: row 2 comes third.
    assert ranks(QUERIES, AXES, ["a", "a", "c"], groups_r).tolist() == [2, 2, 3]
    result = retrieval_recall(QUERIES, AXES, ["a", "a", "c"], groups_r, ks=(1, 2, 3))
    assert result.recall == {1: 0.0, 2: pytest.approx(2 / 3), 3: 1.0}
    assert result.chance[1] == pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)
    assert result.right_answers == pytest.approx(5 / 3)


def test_right_answers_do_not_push_each_other_down():
    scores = np.array([[0.5, 0.6, 0.7, 0.8]])
    assert ranks(scores, AXES, [1], [1, 1, 1, 0]).tolist() == [2]
    assert ranks(scores, AXES, [1], [1, 1, 1, 1]).tolist() == [1]


def test_picture_to_text_is_the_same_with_the_sides_swapped():
    # picture 0 has captions 0 and 1, picture 1 has caption 2
    captions, pictures = QUERIES, AXES[:2]
    assert ranks(captions, pictures, [0, 0, 1], [0, 1]).tolist() == [1, 1, 2]
    # picture 0 scores the captions .9 .5 .4 (right: 0, 1); picture 1 scores them .8 .1 .3 (right: 2)
    assert ranks(pictures, captions, [0, 1], [0, 0, 1]).tolist() == [1, 2]


def test_a_model_that_scores_everything_alike_finds_nothing():
    same = np.ones((5, 3))
    assert ranks(same, same).tolist() == [5] * 5


def test_ranks_do_not_depend_on_how_the_queries_are_cut_into_blocks(monkeypatch):
    queries, rows = tiny.unit_rows(50, 8), tiny.unit_rows(50, 8, seed=1)
    whole = ranks(queries, rows)
    monkeypatch.setattr("clip_train.metrics.BLOCK", 7)
    assert ranks(queries, rows).tolist() == whole.tolist()


def test_a_query_without_right_answer_and_groups_of_other_length_are_errors():
    with pytest.raises(ValueError, match="query 1 has no right answer"):
        ranks(QUERIES, AXES, ["a", "z", "a"], ["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="2 and 4 groups for 3 queries and 4 rows"):
        ranks(QUERIES, AXES, ["a", "z"], ["a", "a", "b", "b"])


@pytest.mark.parametrize(("right", "total", "k"), [(1, 6, 1), (1, 6, 4), (2, 6, 3), (4, 6, 2), (3, 6, 4), (6, 6, 1)])
def test_chance_recall_equals_counting_every_draw(right, total, k):
    draws = list(combinations(range(total), k))
    assert chance_recall(right, total, k) == pytest.approx(sum(min(d) < right for d in draws) / len(draws))


def test_chance_recall_is_exact_for_large_sets_and_never_above_one():
    exact = 1 - math.comb(100_000 - 7, 10) / math.comb(100_000, 10)
    assert chance_recall(7, 100_000, 10) == pytest.approx(exact, rel=1e-12)
    assert chance_recall(1, 5, 10) == 1.0 and chance_recall(0, 5, 10) == 0.0


def test_random_embeddings_score_at_chance():
    queries, rows = tiny.unit_rows(4000, 16), tiny.unit_rows(60, 16, seed=1)
    result = retrieval_recall(queries, rows, np.arange(4000) % 20, np.arange(60) % 20)
    for k in (1, 5, 10):
        assert result.recall[k] == pytest.approx(result.chance[k], abs=0.03)  # 4 standard errors at 4000 queries
    assert np.mean(ranks(queries, rows, np.arange(4000) % 20, np.arange(60) % 20)) == pytest.approx(
        chance_rank(3, 60), rel=0.05
    )


def test_recall_as_json_names_its_k():
    assert retrieval_recall(QUERIES, AXES[:3], ks=(1,)).to_json()["recall"] == {"R@1": pytest.approx(1 / 3)}


def test_modality_gap_is_the_distance_of_the_means():
    image = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert modality_gap(image, image[::-1]) == 0
    assert modality_gap(image, -image) == pytest.approx(math.sqrt(2))
    assert modality_gap(image[:1], -image[:1]) == pytest.approx(2)


def test_metrics_import_no_torch():
    import subprocess
    import sys

    code = "import sys, clip_train.metrics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_embeddings_that_are_not_numbers_find_nothing():
    rows = np.eye(4, dtype=np.float32)
    broken = np.full_like(rows, np.nan)
    assert retrieval_recall(broken, rows).recall[1] == 0 and retrieval_recall(rows, broken).recall[1] == 0


def test_average_precision_worked_by_hand():
    # query 0: right at places 1 and 3 -> (1/1 + 2/3) / 2; query 1: right at place 2 only -> 1/2
    queries = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1]])
    groups = ["a", "b", "a", "c"]
    assert mean_average_precision(queries[:1], AXES, ["a"], groups) == pytest.approx((1 + 2 / 3) / 2)
    assert mean_average_precision(queries, AXES, ["a", "b"], groups) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    same = np.ones((4, 4))  # all tie: the wrong answers count as first
    assert mean_average_precision(same, AXES, [0, 1, 2, 3], [0, 1, 2, 3]) == pytest.approx(1 / 4)
    assert mean_average_precision(AXES, AXES) == 1


def test_with_one_right_answer_average_precision_is_the_mean_inverse_rank():
    queries, rows = tiny.unit_rows(80, 8), tiny.unit_rows(80, 8, seed=1)
    assert mean_average_precision(queries, rows) == pytest.approx(np.mean(1 / ranks(queries, rows)))


def test_nearest_and_class_recalls_worked_by_hand():
    assert nearest(QUERIES, AXES).tolist() == [0, 2, 0]
    recalls = class_recalls(np.array([True, False, True, True]), np.array([0, 0, 2, 2]), 4)
    assert recalls[[0, 2]].tolist() == [0.5, 1] and np.isnan(recalls[[1, 3]]).all()


def test_scores_of_probabilities_worked_by_hand():
    said, was = np.array([0.9, 0.9, 0.1, 0.4]), np.array([True, False, False, True])
    assert brier_score(said, was) == pytest.approx((0.01 + 0.81 + 0.01 + 0.36) / 4)
    assert log_loss(said, was) == pytest.approx(-(2 * math.log(0.9) + math.log(0.1) + math.log(0.4)) / 4)
    # ten bins: 0.1 said, 0 were; 0.4 said, 1 was; 0.9 said, half were
    assert calibration_error(said, was, bins=10) == pytest.approx(0.1 / 4 + 0.6 / 4 + 0.4 / 2)
    told, happened, share = reliability(said, was, bins=10)
    assert told[9] == pytest.approx(0.9) and happened[9] == 0.5 and share[9] == 0.5 and np.isnan(told[0])


def test_a_weight_of_two_is_the_same_case_twice():
    said, was = np.array([0.9, 0.2, 0.6]), np.array([True, False, False])
    weight, twice = np.array([1, 2, 1]), np.array([0, 1, 1, 2])
    for score in (brier_score, log_loss, calibration_error):
        assert score(said, was, weight) == pytest.approx(score(said[twice], was[twice]))
