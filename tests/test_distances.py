import numpy as np
import pytest
import tiny

from diffusion.distances import (
    clip_score,
    compare,
    density_coverage,
    figure_of,
    frechet,
    kernel,
    kernel_difference,
    precision_recall,
    variance_ratio,
)

rng = np.random.default_rng(0)


def with_moments(count, mean, root):
    """Samples whose mean and covariance are exactly these: root @ root.T."""
    x = rng.normal(size=(count, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return white @ root.T + mean


def root_of(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def by_definition(a, b):
    """The formula with matrix roots, by another way: tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2)."""
    one, two = np.cov(a.T), np.cov(b.T)
    mixed = root_of(root_of(one) @ two @ root_of(one))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * mixed)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    a = with_moments(50, np.array([1.0, 2, 3]), np.diag([1.0, 2, 3]))
    b = with_moments(70, np.array([1.0, 0, 3]), np.diag([2.0, 2, 1]))
    assert frechet(a, b) == pytest.approx(4 + 1 + 0 + 4)  # |means|^2 + sum of (std - std)^2 on common axes
    assert frechet(a @ turn, b @ turn) == pytest.approx(9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "m", "wide"), [(200, 90, 6), (7, 9, 20), (30, 5, 10)])
def test_frechet_distance_is_its_definition_for_more_and_for_fewer_samples_than_features(n, m, wide):
    a, b = rng.normal(size=(n, wide)), 1 + rng.normal(size=(m, wide)) @ rng.normal(size=(wide, wide))
    assert frechet(a, b) == pytest.approx(by_definition(a, b), rel=1e-6)


def test_frechet_distance_is_that_of_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = rng.normal(size=(300, 8)), rng.normal(size=(200, 8)) * 1.5 + 0.3
    one, two = np.cov(a.T), np.cov(b.T)
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * linalg.sqrtm(one @ two).real)
    assert frechet(a, b) == pytest.approx(theirs, rel=1e-8)


def test_kernel_distance_is_its_definition_pair_by_pair():
    a, b = rng.normal(size=(6, 5)), rng.normal(size=(4, 5)) + 1

    def k(x, y):
        return (x @ y / 5 + 1) ** 3

    own_a = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    own_b = np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel(a, b) == pytest.approx(own_a + own_b - 2 * across)


def test_kernel_distance_is_torch_fidelitys():
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = rng.normal(size=(40, 16)), rng.normal(size=(40, 16)) + 0.3
    own_a, across, own_b = ((x @ y.T / 16 + 1) ** 3 for x, y in ((a, a), (a, b), (b, b)))
    assert kernel(a, b) == pytest.approx(float(theirs.mmd2(own_a, across, own_b)), rel=1e-9)


def test_kernel_distance_of_one_distribution_is_0_on_average_and_frechets_is_not():
    draws = [(rng.normal(size=(30, 4)), rng.normal(size=(30, 4))) for _ in range(400)]
    values = np.array([kernel(a, b) for a, b in draws])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values)) and (values < 0).any()
    assert np.mean([frechet(a, b) for a, b in draws[:50]]) > 0.1


def test_precision_and_recall_worked_by_hand_on_a_line():
    """Real at 0, 1, 2, 10: reach (k = 1) 1, 1, 1, 8. Made at 0.5, 5, 30, 31: reach 4.5, 4.5, 1, 1."""
    real = np.array([[0.0], [1], [2], [10]])
    made = np.array([[0.5], [5], [30], [31]])
    assert precision_recall(real, made, k=1) == (0.5, 0.75)  # 10 is 5 away from 5: beyond its 4.5
    density, coverage = density_coverage(real, made, k=1)
    assert (density, coverage) == (3 / 4, 3 / 4)  # 0.5 lies in the balls of 0 and 1, 5 in that of 10


def test_precision_and_recall_are_those_of_brute_force():
    real, made = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.6

    def within(points, centres):
        hits = []
        for point in points:
            reach = [sorted(np.linalg.norm(c - o) for o in centres)[3] for c in centres]  # the 0th is itself
            hits.append(any(np.linalg.norm(point - c) <= r for c, r in zip(centres, reach, strict=True)))
        return np.mean(hits)

    assert precision_recall(real, made) == pytest.approx((within(made, real), within(real, made)))


def test_a_generator_that_makes_little_has_precision_but_no_recall():
    real = rng.normal(size=(200, 4))
    figures = compare(real, 0.1 * rng.normal(size=(200, 4)))
    assert figures["precision"].value == 1 and figures["recall"].value < 0.1 and figures["coverage"].value < 0.5
    assert figures["kernel"].low > 0 and figures["precision"].high == 1
    assert variance_ratio(real, real * 0.5) == pytest.approx(0.25)


@pytest.mark.parametrize("measure", [frechet, kernel])
def test_intervals_are_as_wide_as_other_samples_say(measure):
    """Truth from outside: the standard deviation over redrawn sets of the same size."""
    drawn = [(rng.normal(size=(100, 3)), 0.5 + rng.normal(size=(100, 3))) for _ in range(60)]
    wide = [figure_of(measure, a, b) for a, b in drawn[:12]]
    half = np.mean([(one.high - one.low) / 2 for one in wide])
    assert half == pytest.approx(2.09 * np.std([measure(a, b) for a, b in drawn]), rel=0.45)


def test_differences_of_sets_that_belong_together_are_surer_than_each_distance():
    real, base = rng.normal(size=(150, 6)), 0.4 + rng.normal(size=(150, 6))
    other = base + 0.05 * rng.normal(size=(150, 6)) + 0.05
    figure = kernel_difference(real, other, base)
    assert figure.value == pytest.approx(1000 * (kernel(real, other) - kernel(real, base)))
    alone = compare(real, base)["kernel"]
    assert figure.low > 0 and figure.high - figure.low < 0.5 * (alone.high - alone.low)


def test_clip_score_is_100_times_the_cosine_where_that_is_positive():
    image = np.array([[1.0, 0], [0, 1], [1, 0]])
    text = np.array([[0.6, 0.8], [0.6, 0.8], [-1, 0]])
    assert clip_score(image, text).value == pytest.approx(100 * (0.6 + 0.8 + 0) / 3)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="20 at least"):
        compare(tiny.unit_rows(5, 4), tiny.unit_rows(50, 4))
    with pytest.raises(ValueError, match="3 samples have no 3-th neighbour"):
        precision_recall(tiny.unit_rows(3, 4), tiny.unit_rows(9, 4))
