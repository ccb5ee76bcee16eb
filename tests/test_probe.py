import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from clip_train.probe import COARSE, find_peak, fit_probe, linear_probe


def blobs(n, classes=4, dim=8, spread=0.5, seed=0):
    """Unit rows around one direction a class, and the classes."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, n)
    rows = tiny.unit_rows(classes, dim, seed=9)[target] + spread * rng.standard_normal((n, dim)) / np.sqrt(dim)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), target


def test_the_probe_stands_where_the_gradient_of_the_objective_is_zero():
    rows, target = (torch.from_numpy(a) for a in blobs(200))
    weights = fit_probe(rows, target, 4, strength=3.0).double().requires_grad_()
    logits = rows.double() @ weights[:-1] + weights[-1]
    loss = F.cross_entropy(logits, target, reduction="sum") + 1.5 * weights[:-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-2 and gradient[-1].sum().abs() < 1e-4  # of a loss of about 250


def test_more_strength_means_smaller_weights_and_none_means_the_base_rates():
    rows, target = (torch.from_numpy(a) for a in blobs(300))
    sizes = [fit_probe(rows, target, 4, s)[:-1].norm().item() for s in (0.1, 10.0, 1e6)]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 1e-2
    shares = fit_probe(rows, target, 4, 1e6)[-1].softmax(0)
    np.testing.assert_allclose(shares, np.bincount(target) / 300, atol=1e-2)


def test_a_warm_start_ends_where_a_cold_one_does():
    rows, target = (torch.from_numpy(a) for a in blobs(200))
    cold = fit_probe(rows, target, 4, 1.0)
    warm = fit_probe(rows, target, 4, 1.0, fit_probe(rows, target, 4, 100.0))
    assert (warm[:-1] - cold[:-1]).abs().max() < 2e-2


@pytest.mark.parametrize("peak", [1e-6, 0.03, 1.0, 700.0, 1e6])
def test_the_sweep_finds_the_peak_of_a_hill_to_an_eighth_of_a_decade(peak):
    asked = []

    def score(strength):
        asked.append(strength)
        return -abs(np.log10(strength) - np.log10(peak))

    best, taken = find_peak(score)
    assert abs(np.log10(best / peak)) <= 1 / 8 + 1e-9
    assert len(asked) == len(taken) <= len(COARSE) + 8


def test_where_all_strengths_are_as_good_the_strongest_is_taken():
    assert find_peak(lambda strength: 1.0)[0] == 1e6


def test_the_probe_reaches_the_best_possible_score_on_blobs_and_chance_on_noise():
    train, test = blobs(1000, seed=1), blobs(500, seed=2)
    means = np.stack([train[0][train[1] == c].mean(0) for c in range(4)])
    bayes = ((test[0] @ means.T).argmax(1) == test[1]).mean()  # alike round blobs: the nearest mean is the best
    found = linear_probe(*train, *test)
    assert found["acc1"] >= bayes - 0.02 and found["acc5"] == 1 and found["classes"] == 4
    assert found["mean_per_class_recall"] == pytest.approx(found["acc1"], abs=0.03)
    noise = linear_probe(train[0], np.random.default_rng(3).permutation(train[1]), *test)
    assert noise["acc1"] < 0.35 and noise["majority"] == pytest.approx(0.25, abs=0.05)


def test_a_larger_class_number_in_the_test_rows_cannot_hide():
    with pytest.raises(ValueError, match="no right answer"):
        linear_probe(*blobs(40, classes=2), blobs(5)[0], np.array([0, 1, 0, 1, 2]))
