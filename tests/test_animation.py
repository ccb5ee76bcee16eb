import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clip_train.settings import UserError
from diffusion.animation import save_animation, there_and_back

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


def frames(size=(9, 5)):
    return [Image.new("RGB", size, colour) for colour in COLOURS]


def test_there_and_back_has_no_frame_twice_at_the_turns():
    assert there_and_back("abcd") == list("abcdcb") and there_and_back("a") == ["a"]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_shows_its_frames_in_order_and_loops(suffix, tmp_path):
    save_animation(frames(), tmp_path / f"a{suffix}", seconds=0.2)
    with Image.open(tmp_path / f"a{suffix}") as made:
        assert made.n_frames == 3 and made.size == (52 * 9, 52 * 5)  # grown by a whole factor
        assert made.info["loop"] == 0
        for number, colour in enumerate(COLOURS):
            made.seek(number)
            assert np.abs(np.asarray(made.convert("RGB"), dtype=int) - colour).max() <= 8
            assert made.info["duration"] == 200


def test_a_video_shows_its_frames_in_order(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    save_animation(frames((256, 257)), tmp_path / "a.mp4", seconds=0.5)
    raw = [ffmpeg, "-i", str(tmp_path / "a.mp4"), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    read = subprocess.run(raw, capture_output=True, check=True)
    assert b"256x258" in read.stderr and b"2 fps" in read.stderr
    seen = np.frombuffer(read.stdout, np.uint8).reshape(-1, 258, 256, 3)
    assert len(seen) == 3
    for frame, colour in zip(seen, COLOURS, strict=True):
        assert np.abs(frame.mean((0, 1)) - colour).max() < 12
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_without_its_extra_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"pip install 'unclip\[video\]', or write a .gif"):
        save_animation(frames(), tmp_path / "a.mp4")


def test_what_is_no_animation_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a.avi: an animation is a .gif, .webp or .mp4"):
        save_animation(frames(), tmp_path / "a.avi")
    with pytest.raises(UserError, match="no frames"):
        save_animation([], tmp_path / "a.gif")
