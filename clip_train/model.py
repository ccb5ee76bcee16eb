"""open_clip behind one class: pictures and captions in, unit rows of one space out."""

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clip_train import depth
from clip_train.checkpoint import load_tensors, load_weights, save_tensors
from clip_train.folder import fingerprint_files, write_file
from clip_train.settings import UserError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
MAX_LOGIT_SCALE = 100.0  # CLIP section 2.5: the temperature is kept from falling below 1/100
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess_config(size: int) -> dict[str, Any]:
    """open_clip's preprocess_cfg for square pictures of `size` pixels."""
    return {
        "size": [size, size],
        "mode": "RGB",
        "mean": list(OPENAI_MEAN),
        "std": list(OPENAI_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }


class Clip(nn.Module):
    """A CLIP model in open_clip's weights and file format.

    Pixels go in as uint8 (B, 3, S, S) and are normalised here, so that they travel small and the folder's own
    mean and std are the only ones used. Embeddings come out as unit rows (B, D), float32.
    """

    def __init__(self, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> None:
        """model_cfg, preprocess_cfg: as in open_clip_config.json. UserError if open_clip cannot build it."""
        super().__init__()
        import open_clip

        from clip_train.towers import is_quick, quicken

        kind = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
        try:
            self.model = kind(**{k: v for k, v in model_cfg.items() if k != "custom_text"})
        except (TypeError, RuntimeError, ValueError, AssertionError, ArithmeticError) as error:
            raise UserError(f"open_clip cannot build this model: {error}") from error
        how = preprocess_cfg.get("interpolation", "bicubic"), preprocess_cfg.get("resize_mode", "shortest")
        if how != ("bicubic", "shortest"):
            raise UserError(f"unclip resizes pictures by bicubic, shortest; this model wants {', '.join(how)}")
        quicken(self.model)
        self.model_cfg = model_cfg
        self.preprocess_cfg = preprocess_cfg
        self.fingerprint = ""  # of the folder it came from; empty until saved or loaded
        self._quick_image = is_quick(self.model)[0]
        self.register_buffer("mean", torch.tensor(preprocess_cfg["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocess_cfg["std"]).view(1, 3, 1, 1) * 255, persistent=False)

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> "Clip":
        """Read a clip/ folder (or any open_clip "local-dir") ready for use: eval mode, gradients off."""
        return cls._read(Path(folder)).to(device).eval().requires_grad_(False)

    @classmethod
    def pretrained(cls, spec: str | Path) -> "Clip":
        """A model to go on training: a clip/ folder, "local-dir:FOLDER", or "MODEL:TAG" of open_clip's list.

        E.g. "ViT-B-32:laion2b_s34b_b79k"; open_clip fetches a tag's weights once and keeps them in its cache. In eval
        mode, gradients on. UserError if there is no such model or tag, if it cannot be fetched, or if it needs what
        unclip does not do (another tokenizer, another way to resize).
        """
        name, _, tag = str(spec).partition(":")
        if name == "local-dir" or not tag or Path(spec).is_dir():
            folder = Path(tag if name == "local-dir" else spec)
            if not folder.is_dir():
                example = "a model of open_clip by name and tag, such as ViT-B-32:laion2b_s34b_b79k"
                raise UserError(f"{folder}/ does not exist; give a clip/ folder, or {example}")
            return cls._read(folder).eval()
        from clip_train.pretrained import fetch

        return fetch(name, tag).eval()

    @classmethod
    def _read(cls, folder: Path) -> "Clip":
        path = folder / CONFIG_FILE
        try:
            config = json.loads(path.read_text())
            model_cfg, size = config["model_cfg"], config["model_cfg"]["vision_cfg"].get("image_size", 224)
            preprocess_cfg = preprocess_config(size if isinstance(size, int) else size[0]) | config["preprocess_cfg"]
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; train one: unclip train clip --out {folder}") from error
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an open_clip config ({error})") from error
        clip = cls(model_cfg, preprocess_cfg)
        tensors, _ = load_tensors(folder / WEIGHTS_FILE)
        load_weights(clip.model, tensors, folder / WEIGHTS_FILE)
        clip.fingerprint = fingerprint_files([path, folder / WEIGHTS_FILE], folder)
        return clip

    def save(self, folder: Path | str, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write what `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads; `weights` (EMA) go first.

        LoRA adapters are folded into what is written; the model keeps them.
        """
        from clip_train.lora import has_lora, merged_state

        folder = Path(folder)
        config = {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}
        write_file(folder / CONFIG_FILE, json.dumps(config, indent=1).encode())
        if has_lora(self):
            weights = merged_state(self.model, weights)
        save_tensors(folder / WEIGHTS_FILE, weights or self.model.state_dict())
        self.fingerprint = fingerprint_files([folder / CONFIG_FILE, folder / WEIGHTS_FILE], folder)

    @property
    def embed_dim(self) -> int:
        """D, the width of the space."""
        return self.model_cfg["embed_dim"]

    @property
    def image_size(self) -> int:
        """S, the side of the square pictures it takes."""
        size = self.preprocess_cfg["size"]
        return size if isinstance(size, int) else size[0]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.mean.device

    @functools.cached_property
    def tokenizer(self) -> Any:
        """open_clip's byte-pair tokenizer at this model's context length."""
        import open_clip

        text = self.model_cfg["text_cfg"]
        if text.get("hf_tokenizer_name"):
            raise UserError(
                f"this CLIP reads captions by the {text['hf_tokenizer_name']} tokenizer; unclip has open_clip's"
            )
        return open_clip.SimpleTokenizer(
            context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs") or {}
        )

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Token ids (B, context) int64; longer captions are cut, the end token kept."""
        # a 10,000-character caption costs as much as one that fills the context several times over
        limit = 32 * self.tokenizer.context_length
        return self.tokenizer([caption[:limit] for caption in captions])

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """pixels (B, 3, S, S) uint8 or 0..255 float, tokens (B, T) -> image rows, text rows (unit), logit scale.

        A model with a logit_bias (SigLIP: init_logit_bias in its config) returns it as a fourth.
        """
        scalars = [self.model.logit_scale.exp()]
        if self.model.logit_bias is not None:
            scalars.append(self.model.logit_bias)
        return self._image_rows(pixels), self._text_rows(tokens), *(t[0] if t.ndim else t for t in scalars)

    def train(self, mode: bool = True) -> "Clip":
        """As any module's, but locked BatchNorm layers keep their running statistics."""
        super().train(mode)
        depth.freeze_statistics(self)
        return self

    def lr_scales(self, decay: float) -> dict[str, float]:
        """{parameter name: factor on the learning rate}: 1 at the projections, times `decay` a layer; see depth.py."""
        return {f"model.{name}": scale for name, scale in depth.lr_scales(self.model, decay).items()}

    def lock(self, tower: str, unlocked_groups: int = 0) -> None:
        """Train neither the weights nor the running statistics of a tower, "image" (LiT) or "text"; see depth.py.

        Its last `unlocked_groups` groups are left to train: projection, last block, the one before ...
        """
        depth.lock(self.model, tower, unlocked_groups)
        self.train(self.training)

    def set_patch_dropout(self, share: float) -> None:
        """Leave out this share of a ViT's patches in training, others each time (FLIP, arXiv 2212.00794); 0: none."""
        from clip_train.towers import set_patch_dropout

        if not 0 <= share < 1:
            raise UserError(f"patch dropout {share:g} must be at least 0 and below 1")
        set_patch_dropout(self.model.visual, share)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep each block's input alone and compute the rest again in the backward pass: less memory, 4/3 the work."""
        self.model.set_grad_checkpointing(enable)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep logit_scale at or below 100; call after every optimizer step."""
        self.model.logit_scale.clamp_(max=torch.log(torch.tensor(MAX_LOGIT_SCALE)))

    @torch.no_grad()
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> unit rows (B, D) float32 on the CPU."""
        return self._image_rows(pixels.to(self.device, non_blocking=True)).cpu()

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> torch.Tensor:
        """Captions -> unit rows (B, D) float32 on the CPU."""
        return self._text_rows(self.tokenize(captions).to(self.device)).cpu()

    @torch.no_grad()
    def text_states(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The text tower's last hidden states (B, T, W) float32 on its device, and where real tokens are (B, T) bool.

        T is the longest caption of the batch, start and end tokens included.
        """
        from clip_train.towers import cut, text_states

        tower = getattr(self.model, "text", self.model)
        if not hasattr(tower, "token_embedding") or getattr(tower, "cls_emb", None) is not None:
            raise UserError("the states of this CLIP's text tower cannot be read; train one: unclip train clip")
        tokens = self.tokenize(captions).to(self.device)
        tokens = cut(tokens) if tower.attn_mask is not None else tokens
        return text_states(tower, tokens).float(), _real(tokens)

    def _image_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self._quick_image:  # convolutions are faster with the colours of a pixel side by side
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with _fast_attention(self.device):  # of towers that do not have their own
            return F.normalize(self.model.encode_image((pixels - self.mean) / self.std).float(), dim=-1)

    def _text_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        with _fast_attention(self.device):
            return F.normalize(self.model.encode_text(tokens).float(), dim=-1)


def _real(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(-1, keepdim=True)


def _fast_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """On CPUs, attention as plain matrix products: the fused bf16 kernel is about half as fast there."""
    if device.type != "cpu":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
