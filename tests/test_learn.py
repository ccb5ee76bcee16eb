"""Every command that docs/learn shows, as it is written there, on models that are hardly trained; then `lab all`."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from PIL import Image

from cli import cli
from clip_train.embed import embed
from clip_train.fit import FitConfig
from clip_train.folder import partial_of, read_manifest
from clip_train.settings import UserError
from clip_train.shards import list_shards, write_shards
from diffusion.decoder import DecoderConfig
from diffusion.lab import parts, story
from diffusion.lab.experiment import Experiment, Figure, Finding, Part, read_numbers, run_part
from diffusion.lab.page import page_of
from diffusion.lab.run import Run
from diffusion.lab.story import PAGE, STORY, Chapter, Story, story_of, tell
from diffusion.lab.unclip import UnclipConfig
from diffusion.prior import PriorConfig
from diffusion.train_decoder import train_decoder
from diffusion.train_prior import train_prior

PAGES = sorted((Path(__file__).parents[1] / "docs" / "learn").glob("*.md"))
FEWER = {  # what makes each command quick, beside SMALLER; it is run as it stands otherwise
    "spiral": "--steps 20",
    "sampling": "--steps 20",
    "guidance": "--steps 20",
    "forward": "--size 24 --steps 24",
    "denoise": "--count 5 --steps 2",
    "unclip": "--count 8",
    "generate": "--steps 4",
}
SMALLER = {  # what no option says: fewer points, walks and frames
    "FieldConfig": {"drawn": 200, "draw_steps": 8, "levels": 3, "frames": 4},
    "SamplingConfig": {"drawn": 200, "many": 16, "steps": (2, 4, 16), "frames": 4},
    "SteeringConfig": {"drawn": 50, "draw_steps": 4},
    "ForwardConfig": {"arrows": 4, "walks": 300},
    "DenoiseConfig": {"random_steps": 4, "seeds": 2, "grid_steps": (1, 4), "belief_steps": 8},
    "SpaceConfig": {"permutations": 200},
    "UnclipConfig": {"strips": 2, "between": 4},
}


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `unclip ...` that stands in a block of the page."""
    lines = re.findall(r"^    unclip (.+)$", page.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def quick(arguments: list[str]) -> list[str]:
    name = arguments[1] if arguments[0] == "lab" else arguments[0]
    return [*arguments, *FEWER.get(name, "").split()]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("house")
    shards, clip = root / "shards", tiny.clip(root / "clip")
    names = [
        f"{who}{what}"
        for who in ("man", "dog", "cat", "cup", "owl", "bell")
        for what in ("", " with hat", " with coat", " at sea")
    ]
    write_shards([replace(one, captions=[name], meta={"label": name})
                  for one, name in zip(tiny.samples(len(names)), names, strict=True)], shards)  # fmt: skip
    embed(shards, clip, root / "emb")
    fit = FitConfig(steps=2, batch_size=4, precision="fp32")
    small = DecoderConfig(image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16, cond_width=32)
    train_decoder(shards, clip, root / "decoder", small, fit, device="cpu")
    train_prior(
        root / "emb", root / "prior", config=PriorConfig(width=32, depth=1, heads=2), fit_config=fit, device="cpu"
    )
    (root / "fox.png").write_bytes(tiny.picture(3, 40))
    return root


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    for name, settings in SMALLER.items():
        monkeypatch.setattr(parts, name, partial(getattr(parts, name), **settings))


def run(house: Path, monkeypatch, arguments: list[str]):
    monkeypatch.chdir(house)
    answer = CliRunner().invoke(cli, arguments)
    assert answer.exit_code == 0, (arguments, answer.exception)
    return answer


def test_there_are_five_pages_and_each_shows_a_lab_command():
    assert [page.stem for page in PAGES] == ["noise", "space", "steering", "unclip", "walking-back"]
    shown = {arguments[1] for page in PAGES for arguments in commands(page) if arguments[0] == "lab"}
    assert shown == {name for chapter in STORY for name in chapter.experiments}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_and_write_the_figures_it_names(house, monkeypatch, page):
    written = set()
    for arguments in commands(page):
        run(house, monkeypatch, quick(arguments))
        out = house / arguments[arguments.index("--out") + 1]
        written |= {path.name for path in out.iterdir()}
    rows = re.findall(r"^\|([^|]*)\|", page.read_text(), re.MULTILINE)
    named = set(re.findall(r"`([\w-]+\.(?:png|gif))`", "".join(rows)))
    assert named and named <= written
    for path in house.glob("lab-*/*.gif"):
        with Image.open(path) as animation:
            assert animation.n_frames > 3


def quick_part(name: str, asked: list | None = None, dies: bool = False) -> Part:
    """An experiment that takes no time."""

    def experiment(config, folder, on_progress):
        if asked is not None:
            asked.append(name)
        if dies:
            raise KeyboardInterrupt
        Image.new("RGB", (4, 4)).save(folder / "a.png")
        finding = Finding(name="n", says="it is", value=1.0)
        return Experiment(title=name, figures=[Figure(file="a.png", caption="a")], findings=[finding])

    return Part(name=name, config=UnclipConfig(), make=experiment)


def test_lab_all_writes_one_page_that_needs_no_other_file_and_finds_it_done_the_second_time(house, monkeypatch):
    for name in ("spiral", "sampling", "guidance", "forward"):  # the pages ran these
        monkeypatch.setattr(parts, f"{name}_part", lambda *_, name=name, **options: quick_part(name))
    arguments = ["lab", "all", "--run", ".", "--image", "fox.png", "--count", "8"]
    said = run(house, monkeypatch, arguments).stderr
    names = [name for chapter in STORY for name in chapter.experiments]
    assert [said.index(f"lab {name}\n") for name in names] == sorted(said.index(f"lab {name}\n") for name in names)
    page = (house / "lab" / PAGE).read_text()
    heads = [page.index(f". {chapter.title}</h2>") for chapter in STORY]
    assert heads == sorted(heads)
    every = [read_numbers(house / "lab" / name) for name in names]
    assert page.count("<figure>") == sum(len(one["figures"]) for one in every)
    assert page.count("<td class=") == sum(len(one["findings"]) for one in every)
    assert not re.search(r'(?:src|href)="(?!data:image/|#)', page) and "@import" not in page and "<script" not in page
    made = (house / "lab" / PAGE).stat().st_mtime_ns
    assert "look at: lab/lab.html" in run(house, monkeypatch, arguments).stderr
    assert (house / "lab" / PAGE).stat().st_mtime_ns == made


def test_a_killed_lab_all_goes_on_with_the_part_that_was_not_done(monkeypatch, tmp_path):
    names, asked = ["part0", "part1", "part2"], []
    monkeypatch.setattr(story, "STORY", (Chapter("Only", "one", names),))
    with pytest.raises(KeyboardInterrupt):
        told = Story(parts=[quick_part(name, asked, name == "part1") for name in names], missing={}, about="")
        tell(told, tmp_path / "out")
    assert asked == ["part0", "part1"] and partial_of(tmp_path / "out").is_dir()
    tell(Story(parts=[quick_part(name, asked) for name in names], missing={}, about=""), tmp_path / "out")
    assert asked == ["part0", "part1", "part1", "part2"]
    assert list(read_manifest(tmp_path / "out", "lab").result["findings"]) == names


def test_a_part_that_the_pictures_do_not_allow_is_left_out_and_the_others_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(story, "STORY", (Chapter("Only", "one", ["small", "fine"]),))

    def refused(config, folder, on_progress):
        raise UserError("emb holds 10 pictures; 16 are the fewest to look at")

    small, said = replace(quick_part("small"), make=refused), []
    made = tell(Story(parts=[small, quick_part("fine")], missing={}, about=""), tmp_path / "out", say=said.append)
    assert list(made.result["findings"]) == ["fine"] and "16 are the fewest" in made.result["missing"]["small"]
    page = (tmp_path / "out" / PAGE).read_text()
    assert "16 are the fewest" in page and page.count("<figure>") == 1 and any("16 are" in line for line in said)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fine", PAGE, "manifest.json"}


def test_what_people_wrote_is_text_on_the_page_and_not_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    (tmp_path / "one").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "one" / "a.png")
    finding = Finding(name="n", says=evil, value=float("nan"), low=1, unit=evil)
    numbers = {"experiment": "one", "title": evil, "findings": [finding.to_json()],
               "figures": [{"file": "a.png", "caption": f'"{evil}'}]}  # fmt: skip
    (tmp_path / "one" / "numbers.json").write_text(json.dumps(numbers))
    page = page_of([Chapter(evil, evil, ["one", "two"])], tmp_path, evil, {"two": evil})
    assert "<script" not in page and page.count("&lt;script&gt;") >= 8
    assert "<td class=no>no" in page and "was left out" in page


def test_a_run_is_found_by_its_manifests_and_pictures_not_trained_on_are_preferred(house, tmp_path):
    found = Run.find(house)
    assert (found.clip, found.decoder, found.prior) == (str(house / "clip"), house / "decoder", house / "prior")
    assert found.embeddings == house / "emb" and found.seen
    held = house / "held"
    write_shards(tiny.samples(6, "held"), held)
    try:
        embed(held, house / "clip", house / "deep" / "emb-held")
        found = Run.find(house)
        assert found.embeddings == house / "deep" / "emb-held" and not found.seen
        assert [path.parent for path in list_shards(found.shards)] == [held]
        assert Run.find(house, house / "emb").seen
        shutil.copytree(house / "shards", house / "copy")  # the same pictures from another place
        embed(house / "copy", house / "clip", house / "deep" / "emb-copy")
        assert Run.find(house, house / "deep" / "emb-copy").seen and Run.find(house) == found
        more = f"{house / 'shards'}::{held}"  # the largest, and some of it was trained on
        embed(more, house / "clip", house / "deep" / "emb-all")
        assert Run.find(house) == found and Run.find(house, house / "deep" / "emb-all").seen
        decoder = json.loads((house / "decoder" / "manifest.json").read_text())
        few = decoder | {"created": "2999", "inputs": decoder["inputs"] | {"teacher": {"fingerprint": "", "path": ""}}}
        (house / "few").mkdir()
        (house / "few" / "manifest.json").write_text(json.dumps(few))
        assert Run.find(house) == found  # one that was distilled is not what the lab looks into
        (house / "few" / "manifest.json").write_text(json.dumps(decoder | {"created": "2999"}))
        assert Run.find(house).decoder == house / "few"
        (house / "few").rename(house / "deep" / "few")
        assert Run.find(house) == found
    finally:
        shutil.rmtree(house / "deep"), shutil.rmtree(held), shutil.rmtree(house / "copy", ignore_errors=True)


def test_what_a_run_lacks_is_named_and_no_clip_is_an_error(house, tmp_path):
    embed(house / "shards", house / "clip", tmp_path / "emb")
    found = Run.find(tmp_path)
    assert found.clip == str(house / "clip") and found.shards.startswith(str(house / "shards"))  # both lie elsewhere
    story = story_of(replace(found, shards=None), image=house / "fox.png", steps=1)
    assert [part.name for part in story.parts] == ["forward", "spiral", "sampling", "guidance"]
    assert "unclip train decoder" in story.missing["denoise"] and "not where they were" in story.missing["space"]
    shutil.move(house / "shards", house / "elsewhere")
    try:
        assert Run.find(house, tmp_path / "emb").seen  # by fingerprint, though the shards are gone
    finally:
        shutil.move(house / "elsewhere", house / "shards")
    shutil.rmtree(tmp_path / "emb")
    run_part(quick_part("spiral"), tmp_path / "lab")  # a folder of the lab's own is no model
    with pytest.raises(UserError, match="holds no CLIP"):
        Run.find(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Run.find(tmp_path / "nowhere")
