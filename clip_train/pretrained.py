"""Weights that others trained: open_clip's list of models and tags, as a Clip."""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.folder import fingerprint_files
from clip_train.settings import UserError

if TYPE_CHECKING:
    from clip_train.model import Clip


def fetch(name: str, tag: str) -> "Clip":
    """open_clip's model `name` with its weights `tag`, as "ViT-B-32", "laion2b_s34b_b79k"; see Clip.pretrained."""
    import open_clip

    from clip_train.model import Clip

    about = _about(name, tag)
    model_cfg, preprocess_cfg = _configs(name, about)
    clip = Clip(model_cfg, preprocess_cfg)
    _ = clip.tokenizer  # refuses a model whose captions cannot be read
    try:
        file = Path(open_clip.download_pretrained(about))
    except Exception as error:  # no network, no such host, a proxy's page: each library raises a kind of its own
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"cannot fetch {name}:{tag} ({why}); where there is a network, run python -c "
            f"\"import open_clip; open_clip.create_model('{name}', '{tag}')\" and copy its cache (HF_HOME) here"
        ) from error
    try:
        open_clip.load_checkpoint(clip.model, str(file))
    except Exception as error:  # damaged, or not what the config says
        raise UserError(f"{file} does not hold {name}:{tag} ({' '.join(str(error).split())[:200]})") from error
    clip.fingerprint = fingerprint_files([file], file.parent)
    return clip


def _about(name: str, tag: str) -> dict[str, Any]:
    """open_clip's entry for these weights: where they are, mean and std, how pictures are resized."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        models = sorted({model for model, _ in open_clip.list_pretrained()})
        near = difflib.get_close_matches(name, models, 5, 0.3) or models[:5]
        raise UserError(f"open_clip has no weights for a model {name!r}; there are, for example: {', '.join(near)}")
    if tag not in tags:
        raise UserError(f"open_clip has no weights {tag!r} for {name}; there are: {', '.join(tags)}")
    return open_clip.get_pretrained_cfg(name, tag)


def _configs(name: str, about: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_cfg and preprocess_cfg, as open_clip_config.json would hold them."""
    import open_clip

    from clip_train.model import preprocess_config

    model_cfg = open_clip.get_model_config(name)
    if "multimodal_cfg" in model_cfg or model_cfg["text_cfg"].get("hf_model_name"):
        raise UserError(
            f"{name} has a text tower that unclip does not train; choose a ViT, RN or convnext of open_clip"
        )
    size = model_cfg["vision_cfg"]["image_size"]
    if not isinstance(size, int) and size[0] != size[1]:
        raise UserError(f"{name} takes pictures of {size[0]} x {size[1]} pixels; unclip's are square")
    model_cfg["quick_gelu"] = bool(about.get("quick_gelu"))  # as these weights were trained, whatever the name says
    if "timm_model_name" in model_cfg["vision_cfg"]:
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False  # fetches weights that are then replaced
    named = {key: about[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in about}
    preprocess_cfg = preprocess_config(size if isinstance(size, int) else size[0]) | named
    return json.loads(json.dumps(model_cfg)), json.loads(json.dumps(preprocess_cfg))
