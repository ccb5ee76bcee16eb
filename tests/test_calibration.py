import json

import numpy as np
import pytest
import tiny

from clip_train import calibration, metrics
from clip_train.calibration import Pairs, calibrate, draw_pairs, fit_curve, logistic
from clip_train.model import Clip
from clip_train.settings import UserError


def drawn(n, slope, offset, seed=0):
    """Cosines, and matches drawn with exactly the probability that a curve gives them."""
    rng = np.random.default_rng(seed)
    cosine = rng.uniform(-0.2, 0.6, n)
    return cosine, rng.random(n) < logistic(slope * cosine + offset)


def test_the_curve_that_made_the_matches_is_found_again():
    cosine, match = drawn(200_000, 12.0, -3.0)
    slope, offset = fit_curve(cosine, match, np.ones(len(cosine)))
    assert slope == pytest.approx(12, rel=0.02) and offset == pytest.approx(-3, rel=0.02)


def test_held_out_pairs_of_a_true_curve_are_calibrated_and_beat_the_base_rate():
    cosine, match = drawn(50_000, 12.0, -3.0)
    rate = match.mean()
    curve, held_out = calibrate(Pairs(cosine, match, np.arange(len(cosine)) % 5), "sha256:x", rate)
    assert curve.measured["ece"] < 0.01
    # what the truth itself scores on these draws
    truth = metrics.log_loss(logistic(12 * cosine - 3), match)
    assert curve.measured["log_loss"] == pytest.approx(truth, abs=1e-3)
    assert curve.measured["log_loss_base_rate"] == pytest.approx(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))
    np.testing.assert_allclose(curve.probability(cosine), logistic(12 * cosine - 3), atol=0.02)
    np.testing.assert_allclose(held_out, curve.probability(cosine), atol=0.02)


def test_match_rate_moves_the_odds_as_bayes_says():
    cosine, match = drawn(100_000, 12.0, -3.0)
    pairs = Pairs(cosine, match, np.arange(len(cosine)) % 5)
    even, rare = (calibrate(pairs, "", rate)[0] for rate in (0.5, 0.05))
    at = np.array([-0.1, 0.2, 0.5])
    np.testing.assert_allclose(rare.probability(at), even.probability(at, match_rate=0.05), atol=0.01)
    p, q = even.probability(at), even.probability(at, match_rate=0.05)
    np.testing.assert_allclose(q / (1 - q), p / (1 - p) * (0.05 / 0.95))


def test_cosines_that_part_all_matches_give_a_steep_and_finite_curve():
    cosine = np.concatenate([np.full(50, 0.4), np.full(500, 0.1)])
    match = cosine > 0.2
    slope, offset = fit_curve(cosine, match, np.where(match, 10.0, 1.0))
    assert 0 < slope < 1000 and logistic(slope * 0.4 + offset) > 0.9 > 0.1 > logistic(slope * 0.1 + offset)


def test_random_embeddings_promise_nothing():
    image, text = tiny.unit_rows(400, 16), tiny.unit_rows(400, 16, seed=1)
    pairs = draw_pairs(image, text, np.arange(400), np.arange(400))
    curve, held_out = calibrate(pairs, "")
    assert curve.measured["log_loss"] == pytest.approx(np.log(2), abs=0.02)
    assert abs(held_out - 0.5).max() < 0.25


def test_pairs_match_or_are_of_other_groups_of_the_same_fold():
    image = np.eye(60, dtype=np.float32)
    owner, groups = np.repeat(np.arange(60), 2), np.arange(60) // 2
    pairs = draw_pairs(image, image[owner], owner, groups, negatives=7)
    assert pairs.match.sum() == 120 and (pairs.cosine[pairs.match] == 1).all()
    assert (pairs.cosine[~pairs.match] == 0).all()  # never its own picture
    assert 400 < (~pairs.match).sum() < 840 and set(pairs.fold) == set(range(5))
    again = draw_pairs(image, image[owner], owner, groups, negatives=7)
    assert (again.cosine == pairs.cosine).all() and (again.fold == pairs.fold).all()
    weight = pairs.weight(0.2)
    assert weight[pairs.match].sum() / weight.sum() == pytest.approx(0.2)


def test_too_few_things_and_impossible_match_rates_are_one_line():
    with pytest.raises(UserError, match="at least 10 different things, these shards have 3"):
        draw_pairs(np.eye(6), np.eye(6), np.arange(6), np.arange(6) // 2)
    with pytest.raises(UserError, match="not numbers"):
        draw_pairs(np.full((20, 4), np.nan), np.eye(20, 4), np.arange(20), np.arange(20))
    with pytest.raises(UserError, match="--match-rate 1.0"):
        calibrate(Pairs(*drawn(100, 1, 0), np.zeros(100, int)), "", 1.0)


def test_a_saved_curve_comes_back_and_leaves_the_clip_what_it_was(tmp_path):
    folder = tiny.clip(tmp_path / "clip")
    before = Clip.load(folder).fingerprint
    assert calibration.load(folder) is None
    curve, held_out = calibrate(Pairs(*drawn(2000, 12, -3), np.arange(2000) % 5), before)
    calibration.save(folder, curve)
    assert calibration.load(folder) == curve and Clip.load(folder).fingerprint == before
    (folder / calibration.FILE).write_text("{")
    with pytest.raises(UserError, match="calibration.json cannot be read .* --calibrate"):
        calibration.load(folder)
    (folder / calibration.FILE).write_text(json.dumps({"slope": 1, "offset": 0, "match_rate": 2, "clip": ""}))
    with pytest.raises(UserError, match="out of range"):
        calibration.load(folder)


def test_the_reliability_diagram_is_drawn(tmp_path):
    from PIL import Image

    cosine, match = drawn(2000, 12, -3)
    pairs = Pairs(cosine, match, np.arange(2000) % 5)
    curve, held_out = calibrate(pairs, "")
    calibration.plot(tmp_path / "plot.png", pairs, held_out, curve)
    drawing = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB"))
    assert drawing.shape[1] > 800 and drawing.std() > 10
