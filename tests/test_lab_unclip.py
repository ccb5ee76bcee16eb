"""`lab unclip` on a world that is known: a decoder that draws its embedding, a CLIP that reads it back."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.settings import UserError
from diffusion.generate import Generated
from diffusion.heldout import HeldOut
from diffusion.lab.unclip import UnclipConfig, different, scatter, trend, unclip

DIM, SIZE, COUNT = 32, 8, 60
FEW = UnclipConfig(count=40, seeds=3, between=5)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class World:
    """Captions are "0", "1", ...; their embeddings are the pictures', moved along one axis. A picture's pixels are the
    numbers it was drawn from, with a seed's noise."""

    size = SIZE
    decoder = SimpleNamespace(network=SimpleNamespace(config=SimpleNamespace(text=False)))

    def __init__(self, prior: float = 1.0):
        """prior: 1 takes a caption to its picture, 0 leaves it where it is, below 0 takes it away."""
        rng = np.random.default_rng(0)
        self.images = unit(rng.standard_normal((COUNT, DIM)).astype(np.float32))
        self.axis, self.prior, self.clip = np.eye(DIM, dtype=np.float32)[0], prior, self
        self.images[:, 0] = np.abs(self.images[:, 0])

    def encode_text(self, captions) -> torch.Tensor:
        # far from every picture, with a part of what the picture holds and as much again of something else
        which = [int(one) for one in captions]
        rows = 0.3 * self.images[which] + 0.3 * np.roll(self.images, 1, axis=0)[which] - self.axis
        return torch.from_numpy(unit(rows))

    def image_embeddings(self, captions, seeds, how=None) -> torch.Tensor:
        text, own = self.encode_text(captions).numpy(), self.images[[int(one) for one in captions]]
        return torch.from_numpy(unit(text + self.prior * (own - text)).astype(np.float32))

    def from_captions(self, captions, seeds, how=None, on_progress=None, **more) -> list[Generated]:
        return self.from_embeddings(self.image_embeddings(captions, seeds), seeds)

    def from_embeddings(self, rows, seeds, how=None, **more) -> list[Generated]:
        made = []
        for row, seed in zip(np.asarray(rows), seeds, strict=True):
            noisy = row + 0.02 * np.random.default_rng(int(seed)).standard_normal(DIM)
            pixels = np.zeros(3 * SIZE * SIZE, np.uint8)
            pixels[:DIM] = np.clip(127.5 + 127.5 * noisy, 0, 255)
            made.append(Generated(Image.fromarray(pixels.reshape(SIZE, SIZE, 3)), {}))
        return made

    def seen(self, pictures) -> torch.Tensor:
        rows = np.stack([np.asarray(one).reshape(-1)[:DIM] for one in pictures]).astype(np.float32) / 127.5 - 1
        return torch.from_numpy(unit(rows))

    @property
    def held(self) -> HeldOut:
        names = [str(n) for n in range(COUNT)]
        made = HeldOut(name="emb", rows=self.images, captions=names, labels=names, keys=names)
        real = [one.picture for one in self.from_embeddings(self.images, [0] * COUNT)]
        object.__setattr__(made, "pictures", lambda rows, size: [real[row] for row in rows])
        return made


def found(world: World, folder) -> dict:
    made = unclip(FEW, folder, generator=world, held=world.held)
    return {finding.name: finding for finding in made.findings}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder, told = tmp_path_factory.mktemp("unclip"), []
    world = World()
    tell = lambda done, total, **more: told.append((more["stage"], done, total))  # noqa: E731
    return folder, unclip(FEW, folder, tell, generator=world, held=world.held), told


def test_every_claim_holds_where_the_prior_takes_captions_to_their_pictures(good):
    findings = {finding.name: finding for finding in good[1].findings}
    for name in ("gap_left", "guess_keeps_its_own", "prior_beats_text", "embedding_fixes", "on_the_way"):
        assert findings[name].holds, findings[name].verdict
    assert findings["gap_left"].value < 0.2
    assert not findings["true_beats_prior"].holds  # this prior's guess is the true embedding


def test_a_prior_that_leaves_captions_where_they_are_crosses_nothing(tmp_path):
    findings = found(World(prior=0.0), tmp_path)
    assert findings["gap_left"].value == pytest.approx(1, abs=1e-3)
    assert findings["prior_beats_text"].value == pytest.approx(1, abs=1e-6)
    assert not findings["gap_left"].holds and not findings["prior_beats_text"].holds
    assert findings["true_beats_prior"].holds  # as the true embedding is better than the caption's


def test_a_prior_that_goes_the_wrong_way_is_found_out(tmp_path):
    findings = found(World(prior=-0.3), tmp_path)
    assert findings["gap_left"].value > 1 and not findings["gap_left"].holds
    assert not findings["prior_beats_text"].holds


def test_a_prior_that_does_not_read_the_caption_is_found_out(tmp_path):
    world = World()
    everybody = unit(world.images.mean(axis=0)[None])
    world.image_embeddings = lambda captions, seeds, how=None: torch.from_numpy(everybody.repeat(len(captions), axis=0))
    findings = found(world, tmp_path)
    assert findings["gap_left"].value < 1 and not findings["guess_keeps_its_own"].holds
    assert not findings["prior_beats_text"].holds


def test_every_figure_is_written_and_every_stage_told(good):
    folder, experiment, told = good
    assert {figure.file for figure in experiment.figures} == {path.name for path in folder.iterdir()}
    assert {stage for stage, *_ in told} == {"crossing", "ways between"}  # this world draws without a word
    assert [row["way"] for row in experiment.tables["ways"]] == ["true", "prior", "text", "chance"]
    assert len(experiment.tables["between"]) == FEW.strips * FEW.between


def test_rows_of_one_label_are_taken_last():
    held = HeldOut(name="", rows=np.eye(6), captions=[""] * 6, labels=list("aaaabc"), keys=list("uvwxyz"))
    for seed in range(5):
        rows = different(held, 4, seed).tolist()
        assert {held.labels[row] for row in rows[:3]} == set("abc") and len(set(rows)) == 4


def test_scatter_is_none_among_equal_rows_and_one_at_right_angles():
    assert scatter(np.ones((3, 1))) == pytest.approx(0) and scatter(np.eye(3)) == pytest.approx(1)


def test_a_trend_is_the_correlation_with_the_place():
    rows = np.array([[1.0, 2, 3, 4], [4, 3, 2, 1], [5, 5, 5, 5], [1, 0, 0, 1]])
    assert trend(rows).tolist() == pytest.approx([1, -1, 0, 0])
    noise = np.random.default_rng(0).standard_normal(7)
    assert trend(noise) == pytest.approx(np.corrcoef(noise, np.arange(7))[0, 1])


@pytest.mark.parametrize("wrong", [{"count": 7}, {"seeds": 1}, {"between": 2}, {"strips": 0}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        UnclipConfig(**wrong)


def test_too_few_pictures_are_one_line(tmp_path):
    held = HeldOut(name="emb", rows=np.eye(4), captions=["a"] * 4, labels=["a"] * 4, keys=["a"] * 4)
    with pytest.raises(UserError, match="emb holds 4 pictures; 16"):
        unclip(FEW, tmp_path, generator=World(), held=held)
