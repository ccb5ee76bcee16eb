"""What a CLIP is worth on shards kept from its training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_train import metrics
from clip_train.embed import encode_rows, encode_texts
from clip_train.model import Clip
from clip_train.pictures import Pictures
from clip_train.settings import Progress
from clip_train.shards import ShardSet


def evaluate_clip(
    shards: str | Path,
    clip: str | Path,
    label_field: str = "label",
    *,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Retrieval both ways; every sample is asked for once, by its first caption, and all of its label are right.

    Samples without `label_field` in their json are right for equal captions only. Returns recall at 1, 5, 10, the
    median rank and chance of "text_to_image" and "image_to_text", the modality gap, and how many samples there were.
    """
    samples = ShardSet(shards)
    model = Clip.load(clip, device)
    pictures = Pictures(samples, model.image_size)
    image, rows = encode_rows(model, pictures, on_progress=on_progress)
    captions = [samples.captions(row)[0] for row in rows.tolist()]
    text = encode_texts(model, captions)
    labels = [samples.label(row, label_field) or captions[i] for i, row in enumerate(rows.tolist())]
    groups = np.unique([label.lower() for label in labels], return_inverse=True)[1]
    return {
        "samples": len(captions),
        "bad_pictures": len(pictures.bad),
        "labels": int(groups.max()) + 1,
        "text_to_image": metrics.retrieval_recall(text, image, groups, groups).to_json(),
        "image_to_text": metrics.retrieval_recall(image, text, groups, groups).to_json(),
        "modality_gap": metrics.modality_gap(image, text),
    }
