import importlib.util
import re
from collections import Counter

import numpy as np
import pytest

from clip_train import demo
from clip_train.demo import captions_of, read_emoji, split_emoji, stem, with_article, write_demo
from clip_train.folder import read_manifest
from clip_train.pictures import decode_picture
from clip_train.settings import UserError
from clip_train.shards import ShardSet


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The demo's folder and its splits as shards."""
    folder = tmp_path_factory.mktemp("demo") / "pictures"
    manifest = write_demo(folder)
    return folder, manifest, {split: ShardSet(folder / split) for split in demo.SPLITS}


def words_of(text):
    """As plainly as can be, and not as demo.py does it."""
    return re.sub(r"[^\w' ]", " ", text.lower()).split()


def labels(shards):
    return [shards.label(i) for i in range(len(shards))]


def test_demo_holds_about_1900_pictures_in_three_splits_without_overlap(written):
    folder, manifest, splits = written
    sizes = {split: len(shards) for split, shards in splits.items()}
    assert sizes == manifest.result
    assert sum(sizes.values()) > 1850 and 140 <= sizes["recombined"] <= 160 and 190 <= sizes["unseen"] <= 220
    pictures = [s.read(i).meta["sha256"] for s in splits.values() for i in range(len(s))]
    assert len(set(pictures)) == len(pictures)
    names = [name for s in splits.values() for name in labels(s)]
    assert len(set(names)) == len(names)
    assert read_manifest(folder, "demo").fingerprint == manifest.fingerprint
    assert read_manifest(folder / "train", "shards").result["samples"] == sizes["train"]
    assert "CC-BY-4.0" in (folder / "ATTRIBUTION.txt").read_text()


def test_every_unseen_name_has_a_word_that_no_caption_of_train_or_recombined_has(written):
    _, _, splits = written
    shown = set()
    for split in ("train", "recombined"):
        for i in range(len(splits[split])):
            shown |= {w for caption in splits[split].captions(i) for w in words_of(caption)}
    for name in labels(splits["unseen"]):
        new = set(words_of(name)) - shown
        assert new - {"man", "woman", "person", "facing", "right", "left"}, name


def test_every_recombined_name_is_new_but_each_of_its_words_is_in_two_names_of_train(written):
    _, _, splits = written
    train = labels(splits["train"])
    used = Counter(w for name in train for w in set(words_of(name)))
    said = {w for i in range(len(splits["train"])) for c in splits["train"].captions(i) for w in words_of(c)}
    for i, name in enumerate(labels(splits["recombined"])):
        assert name not in train
        assert all(used[w] >= 2 for w in words_of(name)), name
        assert f"{name} facing right" not in train
        assert all(set(words_of(c)) <= said for c in splits["recombined"].captions(i)), name


def test_genders_and_directions_of_an_unseen_concept_stay_together(written):
    _, _, splits = written
    unseen = set(labels(splits["unseen"]))
    everywhere = {name for shards in splits.values() for name in labels(shards)}
    for name in unseen:
        for one in ("man", "woman", "person"):
            for other in ("man", "woman", "person"):
                twin = re.sub(rf"\b{one}\b", other, name)
                assert twin not in everywhere or twin in unseen, (name, twin)
        assert f"{name} facing right" not in everywhere - unseen


def test_pictures_are_on_white_in_rgb_and_captions_start_with_the_plain_name(written):
    _, _, splits = written
    for shards in splits.values():
        for i in range(0, len(shards), 97):
            sample = shards.read(i)
            picture = decode_picture(sample.image)
            assert sample.ext == "png" and picture.size == (72, 72) and picture.mode == "RGB"
            assert sample.caption == sample.meta["label"] and len(sample.captions) >= 4
            assert sample.meta["license"] == "CC-BY-4.0" and "Twitter" in sample.meta["attribution"]
    red_heart = labels(splits["train"]).index("red heart")
    pixels = np.asarray(decode_picture(splits["train"].read(red_heart).image)).astype(int)
    assert (pixels[0, 0] == 255).all() and (pixels[36, 36] == [221, 46, 68]).all()  # Twemoji's red, #DD2E44


def test_a_second_run_finds_everything_done_and_another_folder_gets_the_same_tars(written, tmp_path):
    folder, manifest, splits = written
    tars = {p.name: p.stat().st_mtime_ns for p in folder.glob("*/*.tar")}
    assert write_demo(folder).created == manifest.created
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("*/*.tar")} == tars
    seen = []
    write_demo(tmp_path / "again", on_progress=lambda done, total, **_: seen.append((done, total)))
    assert seen[-1] == (sum(manifest.result.values()),) * 2 and seen == sorted(seen)
    assert ShardSet(tmp_path / "again" / "train").fingerprint == splits["train"].fingerprint


def test_every_drawing_without_a_skin_tone_is_there_once():
    folder = demo._drawings()
    found = read_emoji(folder)
    files = {file.stem for emoji in found for file in emoji.files}
    tones = re.compile("1f3f[b-f]")
    assert files == {file.stem for file in folder.glob("*.png") if not tones.search(file.stem)}
    assert sum(len(part) for part in split_emoji(found).values()) == len(found)
    by_name = {emoji.name: emoji for emoji in found}
    assert by_name["flag of France"].names[1:] == ["flag of St. Martin", "flag of Clipperton Island"]  # one drawing
    assert by_name["flag of Australia"].group == by_name["flag of Sark"].group == "flags"
    assert by_name["keycap 3"].also == ["three"] and by_name["woman judge"].group == "people-body"


@pytest.mark.parametrize(
    "name, said",
    [
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("European castle", "a European castle"),
        ("SOS button", "an SOS button"),
        ("NEW button", "a NEW button"),
        ("UP! button", "an UP! button"),
        ("glasses", "glasses"),
        ("bus", "a bus"),
        ("cactus", "a cactus"),
        ("bread", "bread"),
        ("cooked rice", "cooked rice"),
        ("woman running", "a woman running"),
        ("men holding hands", "men holding hands"),
        ("two hearts", "two hearts"),
        ("face with tears of joy", "a face with tears of joy"),
        ("flag of France", "the flag of France"),
        ("three o'clock", "three o'clock"),
        ("letter A", "the letter A"),
        ("Santa Claus", "Santa Claus"),
    ],
)
def test_captions_take_the_article_that_english_gives_them(name, said):
    assert with_article(name) == said
    assert f"an emoji of {said}" in captions_of(name, [])


def test_names_are_said_in_plain_english():
    names = {emoji.name for emoji in read_emoji(demo._drawings())}
    assert {
        "woman judge",
        "man with red hair",
        "bald woman",
        "flag of the United States",
        "flag of the Bahamas",
        "flag of Japan",
        "kiss of a woman and a man",
        "couple with heart of two men",
        "first place medal",
        "woman's hat",
        "family",
    } <= names
    assert not [name for name in names if re.search(r"[_:()&’]|^\W", name)]


def test_stem_joins_singular_plural_and_possessive():
    for one, other in [("cherries", "cherry"), ("glasses", "glass"), ("books", "book"), ("woman's", "women")]:
        assert stem(one) == stem(other)
    assert len({stem(word) for word in ("bus", "glass", "cactus", "tennis", "boxes", "fox")}) == 6


def test_without_the_packages_the_user_is_told_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "emoji" else find(name, *a))
    with pytest.raises(UserError, match=r"emoji: pip install 'unclip\[demo\]'"):
        write_demo(tmp_path / "pictures")
