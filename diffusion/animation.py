"""Moving pictures: frames -> GIF, animated WebP, or MP4."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_train.folder import write_file
from clip_train.settings import UserError

SUFFIXES = (".gif", ".webp", ".mp4")
SMALLEST = 256  # pixels: frames of a smaller side grow by a whole factor, so that players do not blur them


def check_suffix(path: Path) -> None:
    """UserError if the file's name is of no format written here, or its writer is not installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: an animation is a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if path.suffix.lower() == ".mp4":
        _writer()


def there_and_back(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames forwards, then backwards without the ends, so that a loop has no jump."""
    return [*frames, *frames[-2:0:-1]]


def save_animation(frames: Sequence[Image.Image], path: Path | str, seconds: float = 0.12) -> None:
    """Write frames of one size as an animation that loops (MP4 players decide for themselves). seconds: per frame.

    UserError: no frames, an unknown suffix, or .mp4 without the extra [video] (imageio-ffmpeg, which brings ffmpeg).
    """
    path = Path(path)
    check_suffix(path)
    if not frames:
        raise UserError(f"{path}: no frames to write")
    factor = -(-SMALLEST // min(frames[0].size))
    shape = (frames[0].width * factor, frames[0].height * factor)
    frames = [frame.convert("RGB").resize(shape, Image.Resampling.NEAREST) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".mp4":
        _write_mp4(frames, path, seconds)
        return
    file, form = io.BytesIO(), path.suffix.lower()[1:]
    more = {"lossless": True} if form == "webp" else {}
    first, *rest = frames
    first.save(file, form, save_all=True, append_images=rest, duration=round(1000 * seconds), loop=0, **more)
    write_file(path, file.getvalue())


def _write_mp4(frames: Sequence[Image.Image], path: Path, seconds: float) -> None:
    """H.264 with 4:2:0 colours, which every player has; sides must be even, so an odd one gets a line more."""
    width, height = (side + side % 2 for side in frames[0].size)
    partial = path.with_name(f".{path.stem}.partial.mp4")  # ffmpeg tells the format by the suffix
    rate = round(1 / seconds, 3)
    try:
        writer = _writer()(
            str(partial),
            (width, height),
            fps=rate,
            codec="libx264",
            quality=8,
            macro_block_size=2,
            ffmpeg_log_level="error",
        )
        writer.send(None)
        for frame in frames:
            pixels = np.asarray(frame)
            pixels = np.pad(pixels, ((0, height - frame.height), (0, width - frame.width), (0, 0)), mode="edge")
            writer.send(np.ascontiguousarray(pixels))
        writer.close()
        if not partial.exists() or not partial.stat().st_size:
            raise OSError("ffmpeg wrote nothing")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {' '.join(str(error).split())[:200]}") from error
    finally:
        partial.unlink(missing_ok=True)


def _writer():
    try:
        from imageio_ffmpeg import write_frames
    except ImportError as error:
        raise UserError("an .mp4 file needs imageio-ffmpeg; pip install 'unclip[video]', or write a .gif") from error
    return write_frames
