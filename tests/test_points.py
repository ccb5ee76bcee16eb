import numpy as np
import pytest
import tiny
import tiny_drawing

from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from diffusion.neighbours import key_row, nearest, refuse_other_clip
from diffusion.points import kind_of, point


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("points") / "emb"
    tiny.store(folder, tiny.unit_rows(50, 32, 1), parts=3)
    return EmbeddingStore.open(folder)


def test_a_name_is_a_prefix_a_file_or_a_caption(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fox.png", "row.npy", "noname"):
        (tmp_path / name).write_bytes(b"")
    kinds = [kind_of(name) for name in ("fox.png", "row.npy", "noname", "a fox", "key:a b", "text:fox.png", "image: x")]
    assert kinds == [
        ("image", "fox.png"), ("vector", "row.npy"), ("image", "noname"), ("text", "a fox"), ("key", "a b"),
        ("text", "fox.png"), ("image", "x"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no file owl.PNG; if it is a caption, write text:owl.PNG"):
        kind_of("owl.PNG")
    for empty in ("", "key:", " "):
        with pytest.raises(UserError, match="names nothing"):
            kind_of(empty)


def test_a_point_is_the_embedding_of_what_it_names(store, tmp_path):
    generator = tiny_drawing.generator()
    (tmp_path / "a.png").write_bytes(tiny.picture(3))
    of_picture = point(generator, str(tmp_path / "a.png"))
    source = tiny_drawing.source(3)
    seen = generator.clip.encode_image(generator.clip.to_pixels(source.picture)[None]).numpy()[0]
    assert np.allclose(of_picture.row, seen) and of_picture.picture.sha256 == source.sha256
    assert np.array_equal(point(generator, "key:k00033", store).row, store.image([33])[0])
    np.save(tmp_path / "row.npy", np.arange(32.0))
    assert np.array_equal(point(generator, str(tmp_path / "row.npy")).row, np.arange(32))
    with pytest.raises(UserError, match="--embeddings"):
        point(generator, "key:k00033")
    with pytest.raises(UserError, match="pass --prior"):
        point(generator, "a fox")
    np.save(tmp_path / "rows.npy", np.ones((2, 32)))
    with pytest.raises(UserError, match="holds 2 vectors"):
        point(generator, str(tmp_path / "rows.npy"))
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="b.png cannot be read as a picture"):
        point(generator, str(tmp_path / "b.png"))


def test_the_neighbours_are_those_of_the_largest_cosines(store):
    (asked,) = 3 * tiny.unit_rows(1, 32, 7)
    cosines = store.image() @ asked / np.linalg.norm(asked)
    best = np.argsort(-cosines)[:5]
    found = nearest(store, asked, 5)
    assert found.keys == [f"k{row:05d}" for row in best]
    assert np.allclose(found.scores, cosines[best]) and np.array_equal(found.rows, store.image(best))
    total = store.image(best).sum(0)
    assert np.allclose(found.middle, total / np.linalg.norm(total))
    with pytest.raises(UserError, match="51 neighbours of 50"):
        nearest(store, asked, 51)


def test_a_key_that_is_not_there_is_answered_with_those_that_are_like_it(store):
    with pytest.raises(UserError, match=r"no sample 'k0003'; it has k000"):
        key_row(store, "k0003")


def test_embeddings_of_another_clip_are_refused(store):
    refuse_other_clip(store, "sha256:clip")
    with pytest.raises(UserError, match="another CLIP"):
        refuse_other_clip(store, "sha256:other")
