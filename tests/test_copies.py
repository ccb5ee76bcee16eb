import json

import numpy as np
import pytest
import tiny

from clip_train.settings import UserError
from diffusion.copies import FILE, CopyCheck, nearest_rows, pixel_distance

D = 16


def test_a_training_row_is_a_copy_and_a_new_row_is_not():
    rows = tiny.unit_rows(400, D)
    check = CopyCheck.fit(rows, [f"key{i}" for i in range(400)])
    noisy = rows[7] + 0.02 * tiny.unit_rows(1, D, seed=9)[0]
    made = np.stack([rows[3], 5 * noisy, -rows.mean(0)])
    copied, nearly, new = check.check(made)
    assert (copied.key, copied.is_copy) == ("key3", True) and copied.cosine == pytest.approx(1)
    assert (nearly.key, nearly.is_copy) == ("key7", True)
    assert not new.is_copy and new.cosine == pytest.approx((made[2:] / np.linalg.norm(made[2]) @ rows.T).max())
    assert copied.to_json().keys() == {"key", "cosine", "is_copy", "threshold"}


def test_the_threshold_is_the_quantile_of_nearest_neighbours_by_brute_force():
    rows = tiny.unit_rows(300, D)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -1)
    for quantile in (0.5, 0.95, 1.0):
        assert CopyCheck.fit(rows, quantile=quantile).threshold == pytest.approx(np.quantile(cosine.max(1), quantile))


def test_new_rows_like_the_training_ones_are_called_near_as_often_as_promised():
    rows = tiny.unit_rows(3000, 8)
    check = CopyCheck.fit(rows[:2000], quantile=0.9)
    assert np.mean([one.is_copy for one in check.check(rows[2000:])]) == pytest.approx(0.1, abs=0.03)


def test_pictures_stored_twice_do_not_raise_the_threshold_but_kin_do():
    rows = tiny.unit_rows(200, D)
    plain = CopyCheck.fit(rows).threshold
    twice = CopyCheck.fit(np.concatenate([rows, rows.astype(np.float16).astype(np.float32)]))
    assert twice.threshold == pytest.approx(plain, abs=1e-3)
    kin = rows + 0.2 * tiny.unit_rows(200, D, seed=1)
    kin /= np.linalg.norm(kin, axis=1, keepdims=True)
    assert CopyCheck.fit(np.concatenate([rows, kin])).threshold > max(plain + 0.03, 0.97)


def test_nearest_rows_block_by_block_are_those_of_one_product():
    rows, queries = tiny.unit_rows(500, D), tiny.unit_rows(30, D, seed=1)

    def blocks():
        return ((start, rows[start : start + 7]) for start in range(0, 500, 7))

    cosine, which = nearest_rows(queries, blocks, 10)
    expected = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    assert np.array_equal(which, expected)
    assert np.allclose(cosine, np.take_along_axis(queries @ rows.T, expected, 1))
    own = np.arange(0, 60, 2)
    assert not (nearest_rows(rows[own], blocks, 3, own=own)[1] == own[:, None]).any()


def test_an_embeddings_folder_keeps_its_threshold(tmp_path):
    tiny.store(tmp_path / "emb", tiny.unit_rows(100, D), parts=3)
    check = CopyCheck.open(tmp_path / "emb")
    kept = json.loads((tmp_path / "emb" / FILE).read_text())
    assert kept["threshold"] == check.threshold and check.clip == "sha256:clip"
    assert check.check(tiny.unit_rows(100, D)[41:42])[0].key == "k00041"
    (tmp_path / "emb" / FILE).write_text(json.dumps(kept | {"threshold": 0.5}))
    assert CopyCheck.open(tmp_path / "emb").threshold == 0.5
    assert CopyCheck.open(tmp_path / "emb", quantile=0.5).threshold != 0.5  # asked for another: made again
    (tmp_path / "emb" / FILE).write_text("damaged")
    assert CopyCheck.open(tmp_path / "emb").threshold == check.threshold


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(UserError, match="too few to say what a copy is"):
        CopyCheck.fit(np.repeat(tiny.unit_rows(1, D), 30, axis=0))
    check = CopyCheck.fit(tiny.unit_rows(50, D), clip="sha256:0123456789abc")
    with pytest.raises(UserError, match="of CLIP 0123456789, the pictures of fedcba9876"):
        check.refuse_other_clip("sha256:fedcba9876543")
    with pytest.raises(UserError, match="finite and not zero"):
        check.check(np.zeros((1, D)))
    with pytest.raises(UserError, match="quantile 0"):
        CopyCheck.fit(tiny.unit_rows(50, D), quantile=0)


def test_pixel_distance_is_the_rms_difference_of_grey_levels():
    made = np.full((1, 3, 2, 2), 100, np.uint8)
    training = np.stack([np.full((3, 2, 2), 100), np.full((3, 2, 2), 110)])[None].astype(np.uint8)
    training[0, 1, :, 0, :] = 90
    assert pixel_distance(made, training).tolist() == [[0, 10]]
