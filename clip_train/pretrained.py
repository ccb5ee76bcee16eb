"""Weights that others trained: open_clip's list of models and tags, as a Clip."""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.folder import fingerprint_files, fingerprint_json
from clip_train.settings import UserError

if TYPE_CHECKING:
    from clip_train.model import Clip


def fetch(name: str, tag: str, for_training: bool) -> "Clip":
    """open_clip's model `name` with its weights `tag`, as "ViT-B-32", "laion2b_s34b_b79k"; see Clip.load.

    for_training: refuse, before anything is fetched, what can be embedded with but not trained.
    """
    import open_clip

    from clip_train.model import Clip

    about = _about(name, tag)
    model_cfg, preprocess_cfg = _configs(name, about)
    clip = Clip(model_cfg, preprocess_cfg)
    if for_training:
        refuse_untrainable(name, clip)
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
    clip.fingerprint = fingerprint_json([fingerprint_files([file], file.parent), model_cfg, preprocess_cfg])
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
    size = model_cfg["vision_cfg"]["image_size"]
    model_cfg["quick_gelu"] = bool(about.get("quick_gelu"))  # as these weights were trained, whatever the name says
    if "timm_model_name" in model_cfg["vision_cfg"]:
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False  # fetches weights that are then replaced
    if "hf_model_name" in model_cfg["text_cfg"]:
        model_cfg["text_cfg"]["hf_model_pretrained"] = False
    named = {key: about[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in about}
    preprocess_cfg = preprocess_config(0) | {"size": [size, size] if isinstance(size, int) else list(size)} | named
    return json.loads(json.dumps(model_cfg)), json.loads(json.dumps(preprocess_cfg))


def refuse_untrainable(name: str, clip: "Clip") -> None:
    """UserError for a model that can be embedded with, but whose pictures or captions training reads differently."""
    text = clip.model_cfg["text_cfg"]
    if "multimodal_cfg" in clip.model_cfg or text.get("hf_model_name"):
        raise UserError(
            f"{name} has a text tower that unclip does not train; choose a ViT, RN or convnext of open_clip"
        )
    if text.get("hf_tokenizer_name"):
        raise UserError(
            f"{name} reads captions by the {text['hf_tokenizer_name']} tokenizer; unclip trains with open_clip's alone"
        )
    _ = clip.image_size  # refuses other ways to resize
