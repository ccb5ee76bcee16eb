"""What decoders and upsamplers train on: pictures, their embeddings, their captions as token ids, each made once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clip_train import ranks
from clip_train.arrays import new_array
from clip_train.captions import CaptionTable, caption_table, uniform_of
from clip_train.feed import decoded
from clip_train.fit import Batch, FitConfig
from clip_train.model import Clip
from clip_train.pictures import Batches, Pictures
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet

CACHE_GB = 2.0  # pictures are decoded once and kept as bytes, if they fit


@dataclass(frozen=True)
class PictureFeed:
    """Pictures of one set of shards; rows count its samples."""

    pictures: Pictures
    image: np.ndarray  # (rows, D) float16: embeddings, zeros where a picture is bad
    captions: CaptionTable | None = None

    @classmethod
    def prepare(
        cls,
        samples: ShardSet,
        clip: Clip,
        size: int,
        work: Path,
        on_progress: Progress | None = None,
        *,
        caption_mix: Sequence[float] | None = None,
    ) -> "PictureFeed":
        """Embed the pictures, decode them at `size` pixels, tokenise their captions; all lies in the work's scratch/.

        caption_mix: weights of a sample's captions (captions.pick_caption); None: captions are not needed. on_progress
        counts pictures, with stage="encode". UserError if there are fewer than two.
        """
        if len(samples) < 2:
            raise UserError(f"the shards hold {len(samples)} picture; training needs at least 2")
        tell = (lambda done, total, **numbers: on_progress(done, total, stage="encode")) if on_progress else None
        image = picture_embeddings(samples, clip, work, tell)
        pictures = decoded(samples, size, work, CACHE_GB, tell)
        captions = None if caption_mix is None else caption_table(samples, clip, work, mix=caption_mix)
        return cls(pictures, image, captions)

    def rows(self, rows: np.ndarray) -> Tensor:
        """Embeddings (n, D) float32 of those rows."""
        return torch.from_numpy(self.image[rows].astype(np.float32))

    def batches(self, config: FitConfig) -> Callable[[int], Iterator[Batch]]:
        """This rank's share of every step's batch: pixels uint8, row, image (B, D), and with captions tokens."""
        world = ranks.world_size()
        order = Batches(self.pictures, config.batch_size // world, config.seed, ranks.rank(), world)

        def from_step(step: int) -> Iterator[Batch]:
            for number, batch in enumerate(order(step), start=step):
                rows = batch["row"].numpy()
                batch = batch | {"image": self.rows(rows)}
                if self.captions is not None:
                    batch["tokens"] = self.captions.pick(rows, uniform_of(config.seed, order.places(number)))["tokens"]
                yield batch

        return from_step


def picture_embeddings(samples: ShardSet, clip: Clip, work: Path, on_progress: Progress | None) -> np.ndarray:
    """(rows of the shards, D) float16: embeddings of the pictures, zeros where one is bad; made once, then mapped."""
    path, block = work / "scratch" / "image_emb.npy", 256
    if not path.exists():
        pictures = decoded(samples, clip.image_size, work, CACHE_GB, on_progress)
        if ranks.is_main():
            unfinished = path.with_name("image_emb_part.npy")
            rows = new_array(unfinished, np.float16, (len(samples), clip.embed_dim))
            for start in range(0, len(samples), block):
                pixels, found = pictures.load(np.arange(start, min(start + block, len(samples))))
                if len(found):
                    rows[found] = clip.encode_image(pixels).numpy()
                if on_progress:
                    on_progress(min(start + block, len(samples)), len(samples))
            rows.flush()
            unfinished.replace(path)
        ranks.barrier()
    return np.load(path, mmap_mode="r")
