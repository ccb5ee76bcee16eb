import json
import sys

import crew
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

import cli
from clip_train import calibration, console, evaluate
from clip_train.evaluate import Validation, embed_shards, evaluate_clip
from clip_train.model import Clip
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import ShardSet, write_shards

LETTERS = "abcdefghijklmnopqrst"
WORDS = ["sign", "face", "hat", "fox", "owl", "hen", "bow"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """40 pictures of 20 things in three shards, two to three captions each, and a random CLIP."""
    root = tmp_path_factory.mktemp("world")
    samples = [
        Sample(
            key=f"s{i:03d}",
            image=tiny.picture(i),
            ext="png",
            captions=[f"thing {LETTERS[i // 2]} seen {i}", f"a {WORDS[i % 7]} of {LETTERS[i // 2]}{i}", f"more {i}"][
                : 2 + i % 2
            ],
            meta={"label": f"thing {LETTERS[i // 2]}", "half": "ab"[i % 2], "width": 20, "height": 20},
        )
        for i in range(40)
    ]
    write_shards(samples, root / "shards", samples_per_shard=15)
    tiny.clip(root / "clip")
    return root


@pytest.fixture(scope="module")
def peer(world):
    """Picture and caption rows by open_clip itself: its loader, transform and tokenizer."""
    import io

    import open_clip
    from PIL import Image

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{world / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{world / 'clip'}")
    shards = ShardSet(world / "shards")
    image, text, owner = [], [], []
    with torch.no_grad():
        for row in range(len(shards)):
            with Image.open(io.BytesIO(shards.read(row).image)) as picture:
                image.append(model.eval().encode_image(transform(picture)[None], normalize=True))
            text.append(model.encode_text(tokenizer(shards.captions(row)), normalize=True))
            owner += [row] * len(text[-1])
    return torch.cat(image), torch.cat(text), torch.tensor(owner)


def peer_recall(scores, right, k):
    """Recall as CLIP-like papers and CLIP_benchmark count it: is at least one right answer among torch.topk?"""
    return right.gather(1, scores.topk(k, dim=1).indices).any(1).float().mean().item()


def test_retrieval_with_all_captions_is_what_open_clip_and_topk_give(world, peer):
    image, text, owner = peer
    found = evaluate_clip(world / "shards", world / "clip", captions="all", pairs_only=True)
    scores, right = text @ image.T, owner[:, None] == torch.arange(len(image))
    assert found["samples"] == 40 and found["captions"] == 100
    for k in (1, 5, 10):
        assert found["text_to_image"]["recall"][f"R@{k}"] == pytest.approx(peer_recall(scores, right, k), abs=1e-6)
        assert found["image_to_text"]["recall"][f"R@{k}"] == pytest.approx(peer_recall(scores.T, right.T, k), abs=1e-6)


def test_zero_shot_is_what_open_clip_and_topk_give(world, peer):
    import open_clip

    names, templates = [f"thing {letter}" for letter in LETTERS], ["{c}", "the {c} again"]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{world / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{world / 'clip'}")
    classifier = open_clip.build_zero_shot_classifier(
        model.eval(), tokenizer, names, [lambda c, t=t: t.format(c=c) for t in templates]
    )
    target = torch.arange(40) // 2
    right = (peer[0] @ classifier).topk(5).indices == target[:, None]
    found = evaluate_clip(world / "shards", world / "clip", classnames=names, templates=templates)["zero_shot"]
    assert found["acc1"] == pytest.approx(right[:, 0].float().mean().item(), abs=1e-6)
    assert found["acc5"] == pytest.approx(right.any(1).float().mean().item(), abs=1e-6)
    assert found["mean_per_class_recall"] == pytest.approx(found["acc1"]) and found["without_class"] == 0


@pytest.mark.parametrize("size", [1, 7, 64])
def test_every_sample_is_counted_once_whatever_the_batch_size(world, size):
    clip = Clip.load(world / "clip")
    made = embed_shards(world / "shards", clip, captions="all", batch_size=size)
    whole = embed_shards(world / "shards", clip, captions="all", batch_size=40)
    np.testing.assert_allclose(made.image, whole.image, atol=1e-5)
    np.testing.assert_allclose(made.text, whole.text, atol=1e-5)
    assert made.captions == whole.captions and made.owner.tolist() == whole.owner.tolist()
    found = evaluate_clip(world / "shards", world / "clip", captions="all", batch_size=size)
    truth = evaluate_clip(world / "shards", world / "clip", captions="all", batch_size=40)
    found, truth = dict(numbers_of(found)), dict(numbers_of(truth))
    assert found == pytest.approx(truth, abs=0.011)  # rounding may swap two answers of one query in a hundred
    assert all(found[name] == truth[name] for name in ("samples", "captions", "labels", "text_to_image.queries"))


def numbers_of(figures, prefix=""):
    """{"a": {"b": 1}} as ("a.b", 1)."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and name != "median_rank":
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("size", [1, 7, 64])
def test_validation_says_what_the_whole_evaluation_says(world, size):
    clip = Clip.load(world / "clip")
    validation = Validation(world / "shards", clip, batch_size=size)
    found = evaluate_clip(world / "shards", world / "clip")
    truth = {f"t2i_R@{k}": found["text_to_image"]["recall"][f"R@{k}"] for k in (1, 10)}
    truth |= {f"i2t_R@{k}": found["image_to_text"]["recall"][f"R@{k}"] for k in (1, 10)}
    truth |= {f"zero_shot_acc{k}": found["zero_shot"][f"acc{k}"] for k in (1, 5)}
    assert validation.samples == found["samples"] and validation(clip) == validation(clip)
    assert validation(clip) == pytest.approx(truth, abs=0.026)  # rounding may swap two answers of one query in forty


def says(shards, folder, truth):
    clip = Clip.load(folder)
    calls = []
    clip.register_forward_hook(lambda *_: calls.append(1))
    validation = Validation(shards, clip, batch_size=7, max_samples=39, classnames=())
    assert validation(clip) == pytest.approx(truth) and len(calls) == 3  # of half of 39 pictures, by sevens


def test_two_ranks_share_the_validation_and_both_get_the_numbers_of_one(world):
    clip = Clip.load(world / "clip")
    truth = Validation(world / "shards", clip, max_samples=39, classnames=())(clip)
    crew.run(2, says, world / "shards", world / "clip", truth)


def test_validation_follows_the_weights_and_leaves_the_model_alone(world):
    clip = Clip.load(world / "clip")
    validation = Validation(world / "shards", clip, classnames=["thing a", "thing b"])
    before = validation(clip)
    other = Clip.load(tiny.clip(world / "other", seed=1))
    state = torch.get_rng_state()
    weights = {name: weight.clone() for name, weight in other.state_dict().items()}
    assert validation(other) != before and validation(clip) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in other.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_takes_an_even_share_of_a_large_set_and_no_zero_shot_if_told(world):
    clip = Clip.load(world / "clip")
    validation = Validation(world / "shards", clip, max_samples=10, classnames=())
    assert validation.samples == 10 and len(set(validation.groups.tolist())) == 10
    assert set(validation(clip)) == {"t2i_R@1", "t2i_R@10", "i2t_R@1", "i2t_R@10"}
    with pytest.raises(UserError, match="none of 40 samples has one of the 2 classes .* 'thing a'"):
        Validation(world / "shards", clip, classnames=["fox", "owl"])


def test_classes_that_some_labels_lack_leave_these_samples_out(world):
    found = evaluate_clip(world / "shards", world / "clip", classnames=["thing a", "THING B", "fox"])["zero_shot"]
    assert found["samples"] == 4 and found["without_class"] == 36
    assert found["classes"] == 3 and found["classes_seen"] == 2


def test_lines_of_one_txt_are_captions_of_one_picture(world, tmp_path):
    samples = [
        Sample(key=f"k{i}", image=tiny.picture(i), ext="png", captions=[f"row {i}\n\nalso {i}"]) for i in range(4)
    ]
    write_shards(samples, tmp_path / "shards")
    made = embed_shards(tmp_path / "shards", Clip.load(world / "clip"), captions="lines")
    assert made.captions[:4] == ["row 0", "also 0", "row 1", "also 1"] and made.owner.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]


def test_class_files_without_captions_are_classified(world, tmp_path):
    import io
    import tarfile

    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for i in range(6):
            for name, data in ((f"s{i}.png", tiny.picture(i)), (f"s{i}.cls", str(i % 3).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    options = {"captions": "none", "classnames": ["fox", "owl", "hen"]}
    found = evaluate_clip(tmp_path / "shards", world / "clip", "cls", **options)
    assert found["zero_shot"]["samples"] == 6 and found["captions"] == 0 and "text_to_image" not in found
    made = embed_shards(tmp_path / "shards", Clip.load(world / "clip"), captions="none", label_field="cls")
    assert made.labels == ["0", "1", "2", "0", "1", "2"]
    with pytest.raises(UserError, match="--calibrate needs captions"):
        evaluate_clip(tmp_path / "shards", world / "clip", "cls", calibrate=True, **options)


def test_a_probe_trained_on_the_test_pictures_knows_them_and_its_shards_need_labels(world):
    found = evaluate_clip(world / "shards", world / "clip", "half", probe=world / "shards")
    (shown,) = [rows for _, head, rows in evaluate.tables(found) if head[0] == "classification"]
    found = found["linear_probe"]
    assert [row[0] for row in shown] == ["zero-shot", "linear-probe"] and shown[1][1] == f"{found['acc1']:.3f}"
    assert found["classes"] == 2 and found["acc1"] == pytest.approx(found["train_acc1"]) and found["majority"] == 0.5
    with pytest.raises(UserError, match="at least two values of 'colour', these have 0"):
        evaluate_clip(world / "shards", world / "clip", "colour", probe=world / "shards")


def run(*arguments):
    return CliRunner().invoke(cli.cli, ["evaluate", "clip", *map(str, arguments)], catch_exceptions=False)


def test_calibrate_leaves_the_curve_and_its_diagram_in_the_clip_folder(world):
    clip = tiny.clip(world / "calibrated")
    done = run("--shards", world / "shards", "--clip", clip, "--captions", "all", "--calibrate", "--match-rate", "0.2")
    found = json.loads(done.stdout)["calibration"]
    curve = calibration.load(clip)
    assert curve.match_rate == 0.2 and curve.clip == Clip.load(clip).fingerprint
    assert found["matching_pairs"] == 100 and found["slope"] == curve.slope and (clip / "calibration.png").exists()
    base = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    assert found["log_loss_base_rate"] == pytest.approx(base)


def test_arithmetic_ranks_the_words_of_the_captions_or_of_a_file(world, tmp_path):
    done = run("--shards", world / "shards", "--clip", world / "clip", "--arithmetic", "thing - seen")
    (one,) = json.loads(done.stdout)["arithmetic"]
    assert set(one["left_out"]) == {"thing", "seen"}
    assert len(one["answers"]) == 10 and one["words"] == 1 + len(WORDS) + 40  # "more", and "a0" to "t39"
    (tmp_path / "words.txt").write_text("fox\nowl\nhen\ncat\ndog\ncow\n")
    options = ["--clip", world / "clip", "--words", tmp_path / "words.txt", "--out", tmp_path / "out.json"]
    done = run(*options, "--arithmetic", "fox + owl", "--arithmetic", "2*hen")
    assert len(json.loads(done.stdout)["arithmetic"]) == 2 and (tmp_path / "out.png").exists()
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(done.stdout)


def test_a_terminal_gets_tables_and_a_pipe_json(world, monkeypatch, capsys):
    found = evaluate_clip(world / "shards", world / "clip", captions="all", calibrate=True)
    console.write_figures(found, None, evaluate.tables(found))
    assert json.loads(capsys.readouterr().out) == found
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.write_figures(found, None, evaluate.tables(found))
    shown = capsys.readouterr().out
    for words in (
        "40 pictures, 100 captions, 20 labels",
        "R@10",
        "text to image",
        "zero-shot",
        "Brier",
    ):
        assert words in shown
    assert f"{found['text_to_image']['recall']['R@5']:.3f}" in shown and "\n\n\n" not in shown


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--clip", "c"], "give the shards to evaluate on"),
        (["--shards", "s", "--clip", "c", "--words", "w"], "--words belongs to --arithmetic"),
        (["--clip", "c", "--arithmetic", "a - b"], "--words FILE, or --shards"),
        (["--shards", "s", "--clip", "c", "--templates", "nowhere"], "nowhere cannot be read"),
        (["--shards", "s", "--clip", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words):
        run(*arguments)


def test_captions_of_no_known_kind_are_refused(world):
    with pytest.raises(UserError, match="--captions second must be one of: first, all, lines, none"):
        evaluate_clip(world / "shards", world / "clip", captions="second")
