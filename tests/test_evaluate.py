import io
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

from clip_train.model import Clip
from diffusion.evaluate import chance, embed_pictures, evaluate_loop, round_trip
from diffusion.evaluate_prior import evaluate_prior
from diffusion.generate import Generated
from diffusion.prior import PriorConfig, PriorDenoiser
from diffusion.ridge import ridge_regression

D = 16


def rows(count, seed, wide=D):
    return torch.from_numpy(tiny.unit_rows(count, wide, seed))


def linear_world(count, seed):
    """Pictures are a turned and shifted copy of their texts, so ridge regression knows all there is to know."""
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9)))[0]
    text = rows(count, seed)
    return text, F.normalize(text @ turn + 0.5 * rows(1, 8), dim=-1)


def linear_prior():
    torch.manual_seed(0)
    prior = PriorDenoiser(PriorConfig(embed_dim=D, width=32, depth=1, heads=2)).eval()
    linear = ridge_regression([linear_world(400, 0)])
    prior.network.linear.take(linear)
    return prior


def test_prior_table_ranks_what_knows_more_above_what_knows_less():
    table = evaluate_prior(linear_prior(), *linear_world(100, 1), steps=4)
    cosine = {name: row["cosine"] for name, row in table.items()}
    assert cosine["ridge"] > 0.97 and cosine["prior mean"] == pytest.approx(cosine["ridge"], abs=1e-3)
    assert cosine["ridge"] > cosine["mean image"] > cosine["text"] + 0.2
    assert table["ridge"]["top10"] == 1 and table["unrelated"]["top10"] == 0.1


def test_prior_table_holds_the_cosines_worked_by_hand():
    text, image = linear_world(50, 1)
    table = evaluate_prior(linear_prior(), text, image, steps=1)
    assert table["text"]["cosine"] == pytest.approx((text * image).sum(1).mean().item(), abs=1e-5)
    between = image @ image.T
    unrelated = (between.sum() - between.trace()) / (50 * 49)
    assert table["unrelated"]["cosine"] == pytest.approx(unrelated.item(), abs=1e-4)
    assert table["text"]["other"] == pytest.approx((text @ image.T).mean().item(), abs=1e-5)


def test_several_captions_of_one_picture_share_its_answer():
    text, image = linear_world(30, 1)
    table = evaluate_prior(linear_prior(), text.repeat(2, 1), image.repeat(2, 1), steps=1)
    assert table["ridge"]["top10"] == 1 and table["unrelated"]["top10"] == pytest.approx(10 / 30)


def test_round_trip_of_the_true_embeddings_is_perfect_and_of_others_is_chance():
    all_rows, picked = tiny.unit_rows(1000, 64), np.arange(0, 1000, 2)
    perfect = round_trip(all_rows[picked], picked, all_rows)
    assert [perfect[name] for name in ("top1", "top10", "median_rank", "cosine")] == pytest.approx([1, 1, 1, 1])
    assert perfect["interval"]["top1"] == pytest.approx([0.9924, 1], abs=1e-4)  # Wilson's for 500 of 500
    assert (perfect["count"], perfect["rows"]) == (500, 1000)
    lost, luck = round_trip(tiny.unit_rows(500, 64, seed=1), picked, all_rows), chance(picked, 1000)
    assert luck == pytest.approx({"top1": 0.001, "top10": 0.01, "median_rank": 500.5})
    assert lost["top10"] == pytest.approx(0.01, abs=0.015) and lost["median_rank"] == pytest.approx(500, rel=0.15)


def test_a_picture_with_the_same_label_is_right_as_well():
    all_rows = tiny.unit_rows(10, 64)
    labels = np.repeat(["a", "b", "c", "d", "e"], 2)
    swapped = all_rows[[1, 3]]  # the twins of rows 0 and 2
    assert round_trip(swapped, np.array([0, 2]), all_rows, labels)["top1"] == 1
    assert round_trip(swapped, np.array([0, 2]), all_rows)["top1"] == 0
    assert chance(np.array([0, 2]), 10, labels)["top1"] == pytest.approx(0.2)


class Painter:
    """Stands for a Generator that can paint the picture of an embedding it knows, and paints grey for the others."""

    prior = None

    def __init__(self, known, pictures, reads=False):
        self.known, self.pictures, self.read = known, pictures, []
        self.decoder = SimpleNamespace(network=SimpleNamespace(config=SimpleNamespace(text=reads)))

    def from_embeddings(self, wanted, seeds, how, *, captions=None, batch_size, on_progress):
        wanted = np.asarray(wanted)
        self.read.append(captions)
        best = (wanted @ self.known.T).argmax(1)
        exact = (wanted @ self.known.T).max(1) > 0.999
        grey = Image.new("RGB", (20, 20), "grey")
        return [Generated(self.pictures[i] if hit else grey, {}) for i, hit in zip(best, exact, strict=True)]


def test_the_loop_finds_pictures_painted_from_true_embeddings_and_loses_those_from_text(tmp_path):
    clip = Clip.load(tiny.clip(tmp_path / "clip"))
    pictures = [Image.open(io.BytesIO(tiny.picture(seed))) for seed in range(40)]
    known = embed_pictures(clip, pictures, batch_size=16)
    assert known.shape == (40, 32)
    picked = [3, 1, 4, 15, 9]
    captions = [f"picture number {i}" for i in picked]
    blind, reader = Painter(known, pictures), Painter(known, pictures, reads=True)
    numbers, made = evaluate_loop(blind, clip, captions, picked, known)
    evaluate_loop(reader, clip, captions, picked, known)
    assert blind.read == [None, None] and reader.read == [captions, captions]  # true and text alike
    # not quite 1: two of these random pictures look the same to a random CLIP
    assert numbers["true"]["top1"] >= 0.8 and numbers["true"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert numbers["text"]["top1"] <= 0.2
    assert set(numbers) == {"true", "text", "chance"} and numbers["chance"]["top10"] == pytest.approx(0.25)
    assert [len(some) for some in made.values()] == [5, 5]
