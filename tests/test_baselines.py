import json

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from clip_train.fit import FitConfig
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from diffusion import commands, evaluate_commands
from diffusion.baselines import BASELINES, Knn, choose_knn, open_prior
from diffusion.contrastive import ContrastiveConfig
from diffusion.evaluate_prior import compared, evaluate_prior_folder, table_of
from diffusion.heldout import labels_of
from diffusion.pairs import Pairs
from diffusion.prior import PriorConfig
from diffusion.train_prior import train_prior
from diffusion.trained import kind_of

D = 12


def rows(count, seed):
    return torch.from_numpy(tiny.unit_rows(count, D, seed))


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Embeddings to fit to and others kept from them, and a prior of each kind."""
    root = tmp_path_factory.mktemp("house")
    tiny.store(root / "emb", tiny.unit_rows(80, D, 1), tiny.unit_rows(80, D, 2), parts=2)
    tiny.store(root / "val", tiny.unit_rows(30, D, 3), tiny.unit_rows(30, D, 4))
    few = FitConfig(steps=3, batch_size=16, precision="fp32")
    train_prior(root / "emb", root / "prior", PriorConfig(width=16, depth=1, heads=2), few, device="cpu")
    train_prior(root / "emb", root / "fast", ContrastiveConfig(width=16, depth=1), few, device="cpu")
    return root


def test_each_baseline_is_its_formula(house):
    store, text = EmbeddingStore.open(house / "emb"), rows(5, 9)
    captions, row = store.captions()
    mean_text, mean_image = (torch.from_numpy(part).mean(0) for part in (captions, store.image()[row]))
    expected = {"text": text, "shift": text - mean_text + mean_image, "mean": mean_image.expand(5, D)}
    for name, want in expected.items():
        guess, _, manifest = open_prior(name, embeddings=house / "emb")
        made = guess.rows(text, None, range(5), steps=3, guidance=2.0, candidates=4)
        assert manifest is None and guess.name == name
        assert torch.allclose(made, F.normalize(want, dim=-1), atol=1e-5), name


def test_ridge_of_a_folder_is_the_textbook_formula_on_all_its_pairs(house):
    store, text = EmbeddingStore.open(house / "emb"), rows(5, 9).double()
    captions, row = store.captions()
    x, y = captions.astype(np.float64), store.image()[row].astype(np.float64)
    guess, _, _ = open_prior("ridge", embeddings=house / "emb")
    inputs, outputs = x - x.mean(0), y - y.mean(0)
    errors = []
    for penalty in np.logspace(-4, 4, 33):
        weight = np.linalg.solve(
            inputs.T @ inputs + penalty * np.square(inputs).sum() / D * np.eye(D), inputs.T @ outputs
        )
        want = y.mean(0) + (text.numpy() - x.mean(0)) @ weight
        made = guess.rows(text.float()).numpy()
        errors.append(np.abs(made - want / np.linalg.norm(want, axis=1, keepdims=True)).max())
    assert min(errors) < 1e-5


def test_knn_is_the_softmax_mean_of_the_nearest_captions_pictures_by_brute_force():
    captions, image, text = rows(50, 0), rows(20, 1), rows(7, 2)
    row = torch.arange(50) % 20
    made = Knn(captions, image, row, k=6, temperature=0.3).rows(text)
    for one, query in zip(made, text, strict=True):
        scores = sorted(((float(query @ captions[i]), i) for i in range(50)), reverse=True)[:6]
        weights = np.exp([score / 0.3 for score, _ in scores])
        want = sum(w * image[row[i]] for w, (_, i) in zip(weights, scores, strict=True))
        assert torch.allclose(one, F.normalize(want, dim=0), atol=1e-5)


def test_knn_of_one_neighbour_is_its_picture_and_a_hot_one_of_all_is_the_mean():
    captions, image = rows(40, 0), rows(40, 1)
    alone = Knn(captions, image, torch.arange(40), k=1, temperature=0.05).rows(captions)
    assert torch.allclose(alone, image, atol=1e-6)
    hot = Knn(captions, image, torch.arange(40), k=99, temperature=1e6).rows(captions[:3])
    assert torch.allclose(hot, F.normalize(image.mean(0), dim=0).expand(3, D), atol=1e-4)


def test_k_and_temperature_are_chosen_where_they_help_on_groups_held_out():
    # ten groups around ten axes; a caption says its group's axis, and within a group all pictures are noise around it
    axes = torch.eye(D)[:10]
    group = np.repeat(np.arange(200), 5)  # 200 labels, twenty to an axis
    noise = 0.8 * torch.randn(1000, D, generator=torch.Generator().manual_seed(0)) / D**0.5
    image = F.normalize(axes[group % 10] + 3 * noise, dim=-1)
    text = F.normalize(axes[group % 10] + 0.05 * rows(1000, 3), dim=-1)
    chosen = choose_knn(Pairs(text.numpy(), image.numpy(), np.arange(1000)), group)
    one = Knn(text, image, torch.arange(1000), k=1, temperature=1.0)
    assert chosen.k >= 64 and chosen.held_out == 100  # one neighbour is as noisy as the truth: many average it out
    assert chosen.cosine > F.cosine_similarity(one.rows(text[:-5]), image[5:]).mean()


def test_equal_labels_or_else_equal_captions_are_one_group(house):
    assert len(set(labels_of(EmbeddingStore.open(house / "emb")))) == 80


def test_a_baseline_is_known_by_what_it_was_fitted_to(house):
    made = {name: open_prior(name, embeddings=house / "emb")[1] for name in BASELINES}
    assert len({one["prior"] for one in made.values()}) == len(BASELINES)
    assert all(one["clip"] == "sha256:clip" for one in made.values())
    assert open_prior("knn", embeddings=house / "val")[1]["prior"] != made["knn"]["prior"]
    assert open_prior("text")[1].keys() == {"prior"}  # needs no embeddings
    with pytest.raises(UserError, match="pass --embeddings emb"):
        open_prior("knn")
    with pytest.raises(UserError, match="does not exist; make it: unclip train prior"):
        open_prior("nearest", embeddings=house / "emb")


def test_the_table_holds_trained_priors_and_baselines_of_their_own_training(house):
    made = evaluate_prior_folder(house / "val", [house / "prior", house / "fast"], steps=2)
    figures = made.figures
    trained = {"prior", "prior, one draw", "prior mean", "contrastive"}
    assert set(figures) == trained | {"text", "text + shift", "ridge", "knn", "mean image", "unrelated"}
    val, text = EmbeddingStore.open(house / "val"), torch.from_numpy(EmbeddingStore.open(house / "val").text())
    knn = open_prior("knn", embeddings=house / "emb")[0].rows(text).numpy()
    assert figures["knn"]["cosine"] == pytest.approx(float((knn * val.image()).sum(1).mean()), abs=1e-5)
    assert figures["unrelated"]["top10"] == pytest.approx(1 / 3)
    title, head, lines = table_of(made)
    assert len(lines) == len(figures) and all(len(line) == len(head) for line in lines)
    assert made.sentence.startswith("best on this data: ")
    with pytest.raises(UserError, match="is a baseline"):
        evaluate_prior_folder(house / "val", "knn")


def test_both_kinds_train_and_are_compared_from_the_command_line(house, tmp_path):
    run = CliRunner().invoke
    few = ["--steps", "2", "--batch-size", "8", "--set", "width=16", "--set", "depth=1", "--device", "cpu"]
    for kind in ("diffusion", "contrastive"):
        more = ["--set", "heads=2"] if kind == "diffusion" else []
        args = ["--embeddings", str(house / "emb"), "--out", str(tmp_path / kind), "--kind", kind, *few, *more]
        done = run(commands.train_prior, args, catch_exceptions=False)
        assert done.exit_code == 0 and kind_of(tmp_path / kind) == kind
    priors = [part for kind in ("diffusion", "contrastive") for part in ("--prior", str(tmp_path / kind))]
    args = ["--embeddings", str(house / "val"), *priors, "--steps", "2", "--device", "cpu"]
    done = run(evaluate_commands.evaluate_prior, [*args, "--out", str(tmp_path / "f.json")], catch_exceptions=False)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert done.exit_code == 0 and {"prior mean", "contrastive", "knn", "best"} <= set(figures)
    assert figures["best"] in done.stderr


def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    # true rows are axes, and a guess is right with probability 0.6: the share of right ones is known
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        answer = np.arange(60)
        said = np.where(rng.random(60) < 0.6, answer, (answer + 1) % 60)
        guess = torch.eye(60)[torch.from_numpy(said)]
        made = compared({"guess": guess}, torch.eye(60), torch.eye(60), answer, answer, seed=seed)
        low, high = made.figures["guess"]["interval"]["top1"]
        assert made.figures["guess"]["top1"] == pytest.approx((said == answer).mean())
        held += low <= 0.6 <= high
    assert 33 <= held <= 40


def test_drawings_of_one_label_count_as_one_and_make_intervals_wider():
    answer = np.arange(64)
    said = torch.eye(64)[torch.from_numpy(np.where(answer // 16 % 2 == 0, answer, 0))]
    wide, narrow = (
        compared({"g": said}, torch.eye(64), torch.eye(64), answer, answer, blocks=blocks).figures["g"]["interval"][
            "top1"
        ]
        for blocks in (answer // 16, answer)
    )
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])


def test_the_sentence_says_which_guess_is_best_and_what_is_not_told_from_it():
    image = rows(200, 0)
    close, far = F.normalize(image + 0.2 * rows(200, 1), dim=-1), F.normalize(image + 2.0 * rows(200, 2), dim=-1)
    twin = F.normalize(image + 0.2 * rows(200, 3), dim=-1)
    answer = np.arange(200)
    said = compared({"far": far, "close": close, "twin": twin}, image, image, answer, answer).sentence
    first = said.removeprefix("best on this data: ").split("; ")[0]
    assert first.startswith(("close by cosine", "twin by cosine"))
    assert "far" not in said.split("true picture first")[0]
    assert "not told from it" in said  # close and twin have the same ranks
