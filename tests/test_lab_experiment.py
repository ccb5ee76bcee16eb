import json
import math
import warnings

import pytest

from clip_train.settings import UserError
from diffusion.lab.experiment import Experiment, Finding, Part, read_numbers, run_part
from diffusion.lab.style import drawing, frame, panels
from diffusion.lab.unclip import UnclipConfig


@pytest.mark.parametrize(
    ("value", "low", "high", "holds"),
    [(2.0, 1, 3, True), (1.0, 1, 3, True), (3.0, 1, 3, True), (0.99, 1, 3, False), (3.01, 1, 3, False),
     (math.nan, -math.inf, math.inf, False), (math.inf, 1, math.inf, True)],
)  # fmt: skip
def test_a_finding_holds_within_its_band_and_never_where_it_is_no_number(value, low, high, holds):
    assert Finding(name="n", says="s", value=value, low=low, high=high).holds is holds


def test_a_verdict_never_shows_a_number_that_contradicts_it():
    third = 100 / 3
    just_below = Finding(name="n", says="s", value=third, low=math.nextafter(third, 100), unit="%")
    assert not just_below.holds and just_below.found.removesuffix(" %") != just_below.asked.removeprefix("at least ")
    near = Finding(name="n", says="as good", value=0.99996, low=1)
    assert near.verdict == "NO: as good: 0.99996 (at least 1)"
    assert Finding(name="n", says="s", value=12345.6, low=2).found == "12346"
    assert Finding(name="n", says="s", value=2.0, low=2, high=3).verdict == "yes: s: 2 (at least 2 and at most 3)"


def test_numbers_are_json_even_where_they_are_none(tmp_path):
    findings = [Finding(name="a", says="s", value=math.nan, low=1), Finding(name="b", says="s", value=1.0)]
    tables = {"t": [{"x": math.inf, "y": [math.nan, 1.0]}]}

    def make(config, folder, on_progress):
        return Experiment(title="t", figures=[], findings=findings, tables=tables)

    manifest = run_part(Part(name="spiral", config=UnclipConfig(), make=make), tmp_path / "out")
    for file in ("numbers.json", "manifest.json"):
        json.loads((tmp_path / "out" / file).read_text(), parse_constant=lambda name: pytest.fail(name))
    numbers = read_numbers(tmp_path / "out")
    assert (
        numbers["tables"] == {"t": [{"x": None, "y": [None, 1.0]}]} and manifest.result["findings"][0]["value"] is None
    )
    back = [Finding.from_json(one) for one in numbers["findings"]]
    assert math.isnan(back[0].value) and not back[0].holds and back[0].found == "nan" and back[1] == findings[1]


def test_a_folder_of_other_settings_is_not_taken_for_this_one(tmp_path):
    made = []

    def make(config, folder, on_progress):
        made.append(config.seed)
        return Experiment(title="t", figures=[], findings=[])

    for seed in (0, 0):
        run_part(Part(name="spiral", config=UnclipConfig(seed=seed), make=make), tmp_path / "out")
    assert made == [0]
    with pytest.raises(UserError, match="seed = 0, but 1"):
        run_part(Part(name="spiral", config=UnclipConfig(seed=1), make=make), tmp_path / "out")


def test_letters_that_no_font_has_are_drawn_without_a_warning():
    with warnings.catch_warnings(record=True) as caught, drawing():
        warnings.simplefilter("always", append=True)
        figure, axes = panels()
        axes[0, 0].set_title("🦊 狐 שועל \U0001f9d1\u200d\U0001f680")
        assert frame(figure).size[0] > 100
    assert [str(one.message) for one in caught] == []
