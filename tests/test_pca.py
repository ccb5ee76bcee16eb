import numpy as np
import pytest
import tiny
import tiny_drawing

from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from diffusion.generate import Sampling
from diffusion.pca import Pca, reconstruct


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pca") / "emb"
    tiny.store(folder, tiny.unit_rows(60, 32, 1), parts=3)
    return EmbeddingStore.open(folder)


def test_the_axes_are_those_of_a_singular_value_decomposition(store):
    rows = store.image().astype(np.float64)
    _, values, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = Pca.fit(store)
    assert np.allclose(found.variance, values**2 / len(rows)) and np.all(np.diff(found.variance) <= 0)
    assert np.allclose(np.abs(np.sum(found.axes * axes, axis=1)), 1)  # their sign is open
    assert found.share(32) == pytest.approx(1) and found.share(5) == pytest.approx(
        (values[:5] ** 2).sum() / (values**2).sum()
    )


def test_all_axes_keep_a_row_and_none_leaves_the_mean(store):
    axes, (row,) = Pca.fit(store), tiny.unit_rows(1, 32, 9)
    assert np.allclose(axes.kept(row, 32), row, atol=1e-5)
    assert np.allclose(axes.kept(row, 0), axes.mean / np.linalg.norm(axes.mean), atol=1e-5)
    near = [axes.kept(row, count) @ row for count in (0, 8, 16, 24, 32)]
    assert near == sorted(near)
    with pytest.raises(UserError, match="33 of 32 axes"):
        axes.kept(row, 33)


def test_a_reconstruction_has_a_picture_for_each_count_and_ends_in_the_whole(store):
    generator, (row,), how = tiny_drawing.generator(), tiny.unit_rows(1, 32, 9), Sampling(steps=3)
    made = reconstruct(generator, row, Pca.fit(store), [4, 32], 5, how)
    assert [one.provenance["task"]["axes"] for one in made] == [4, 32]
    assert made[1].provenance["task"]["cosine"] == 1 > made[0].provenance["task"]["cosine"]
    (whole,) = generator.from_embeddings(row[None], [5], how)
    assert np.abs(np.asarray(made[1].picture).astype(int) - np.asarray(whole.picture)).max() <= 1
    again = generator.regenerate(made[0].provenance)  # its record holds the embedding: no axes needed
    assert np.abs(np.asarray(again.picture).astype(int) - np.asarray(made[0].picture)).max() <= 1
