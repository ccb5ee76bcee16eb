import numpy as np
import pytest
import tiny
import tiny_drawing
from PIL import Image

from clip_train.settings import UserError
from diffusion import gallery
from diffusion.asked import Asked, fill, steps_of
from diffusion.gallery import Gallery, read_record, refuse_overwriting
from diffusion.generate import Sampling

HOW = Sampling(steps=2)


@pytest.fixture
def counted(monkeypatch):
    """The generator, and how many pictures it has drawn."""
    generator, drawn = tiny_drawing.generator(), []
    real = type(generator).from_embeddings
    monkeypatch.setattr(
        type(generator),
        "from_embeddings",
        lambda self, rows, *rest, **more: drawn.extend(rows) or real(self, rows, *rest, **more),
    )
    return generator, drawn


def asked(n=5):
    return Asked([f"row {i}" for i in range(n)], rows=tiny.unit_rows(n, 32))


def filled(folder, generator, seeds=range(5), how=HOW, **more):
    return list(fill(Gallery(folder, None, generator), generator, asked(len(seeds)), seeds, how, batch_size=2, **more))


def test_a_run_that_was_killed_goes_on_and_draws_nothing_twice(counted, tmp_path):
    generator, drawn = counted
    whole = [path.read_bytes() for path in filled(tmp_path / "whole", generator)]
    drawn.clear()
    run = fill(Gallery(tmp_path / "out", None, generator), generator, asked(), range(5), HOW, batch_size=2)
    next(run)  # one batch of two is written; then the run dies
    del run
    (tmp_path / "out" / ".00002.png.tmp").write_bytes(b"half a picture")
    paths = filled(tmp_path / "out", generator)
    assert len(drawn) == 5  # and not 7
    assert [path.name for path in paths] == [f"{n:05d}.png" for n in range(5)]
    for path, once in zip(paths, whole, strict=True):
        assert read_record(path)["seed"] == int(path.stem)
        (tmp_path / "w.png").write_bytes(once)
        with Image.open(path) as a, Image.open(tmp_path / "w.png") as b:
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    filled(tmp_path / "out", generator)
    assert len(drawn) == 5


def test_pictures_of_another_seed_setting_or_model_are_put_behind_and_nothing_is_overwritten(counted, tmp_path):
    generator, drawn = counted
    first = [path.read_bytes() for path in filled(tmp_path, generator, range(2))]
    again = filled(tmp_path, generator, range(1, 3))  # other rows for these seeds
    steps = filled(tmp_path, generator, range(2), Sampling(steps=3))
    other = tiny_drawing.generator.__wrapped__()
    other.fingerprints = {"decoder": "sha256:other"}
    model = filled(tmp_path, other, range(2))
    names = [path.name for path in (*again, *steps, *model)]
    assert names == [f"{n:05d}.png" for n in range(2, 8)]
    assert [(tmp_path / f"{n:05d}.png").read_bytes() for n in range(2)] == first


def test_of_two_that_draw_into_one_folder_the_second_says_so_and_overwrites_nothing(counted, tmp_path):
    first = Gallery(tmp_path / "out", None, counted[0])
    second = Gallery(tmp_path / "out", None, counted[0])  # there is no folder yet
    (made,) = asked(1).draw(counted[0], [0], HOW)
    path = first.add(made)
    with pytest.raises(UserError, match="another process is drawing into"):
        second.add(made)
    with pytest.raises(UserError, match="another process is drawing into"):
        Gallery(tmp_path / "out", None, counted[0])
    del first, second
    assert Gallery(tmp_path / "out", None, counted[0]).find(made.provenance) == path


def test_without_locks_the_folder_is_looked_through_once(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "fcntl", None)  # as on Windows
    looked, real = [], Gallery._look
    monkeypatch.setattr(Gallery, "_look", lambda self: looked.append(self) or real(self))
    assert len(filled(tmp_path / "out", counted[0])) == 5 and len(looked) == 1
    assert len(filled(tmp_path / "out", counted[0], range(5, 8))) == 3 and len(looked) == 2


def test_what_other_people_put_into_the_folder_stays(counted, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "00007.png")
    (tmp_path / "00009.jpg").write_bytes(b"no picture")
    (path,) = filled(tmp_path, counted[0], range(1))
    assert path.name == "00010.png"


@pytest.mark.parametrize("form", ["png", "webp", "jpg"])
def test_every_format_holds_the_record_and_the_lossless_ones_the_picture(form, tmp_path):
    generator = tiny_drawing.generator()
    (made,) = generator.from_embeddings(tiny.unit_rows(1, 32), [3], HOW, captions=["größer ☃"])
    path = Gallery(tmp_path / "out", form).add(made)
    assert path.suffix == f".{form}" and read_record(path) == made.provenance
    with Image.open(path) as saved:
        away = np.abs(np.asarray(saved.convert("RGB")).astype(int) - np.asarray(made.picture)).max()
    assert away < 60 if form == "jpg" else away == 0


def test_a_file_without_a_record_says_so(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
        with pytest.raises(UserError, match="does not say how it was made"):
            read_record(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    for name in ("b.jpg", "none.jpg"):
        with pytest.raises(UserError, match="cannot be read as a picture with a record"):
            read_record(tmp_path / name)


def test_one_file_takes_one_picture_and_never_the_place_of_what_it_is_made_from(tmp_path):
    with pytest.raises(UserError, match="name of one picture, but 2"):
        Gallery(tmp_path / "a.png").room_for(2)
    with pytest.raises(UserError, match="contradict"):
        Gallery(tmp_path / "a.png", "jpg")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="another name"):
        refuse_overwriting(tmp_path / "a.png", [tmp_path / "." / "a.png"])


def test_the_steps_of_a_picture_stand_beside_it(counted, tmp_path):
    paths = filled(tmp_path, counted[0], range(2), strips=True)
    assert all(steps_of(path).name == f"{path.stem}-steps.png" and steps_of(path).is_file() for path in paths)
    with Image.open(steps_of(paths[0])) as strip:
        assert strip.width > 2 * 96  # two steps: a guess and the picture
    with pytest.raises(UserError, match="--candidates"):
        filled(tmp_path, counted[0], range(2), Sampling(candidates=2), strips=True)
