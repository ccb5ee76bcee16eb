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

        kind = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
        try:
            self.model = kind(**{k: v for k, v in model_cfg.items() if k != "custom_text"})
        except (TypeError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"open_clip cannot build this model: {error}") from error
        self.model_cfg = model_cfg
        self.preprocess_cfg = preprocess_cfg
        self.fingerprint = ""  # of the folder it came from; empty until saved or loaded
        self.register_buffer("mean", torch.tensor(preprocess_cfg["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocess_cfg["std"]).view(1, 3, 1, 1) * 255, persistent=False)

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> "Clip":
        """Read a clip/ folder (or any open_clip "local-dir") ready for use: eval mode, gradients off."""
        folder = Path(folder)
        path = folder / CONFIG_FILE
        try:
            config = json.loads(path.read_text())
            model_cfg, preprocess_cfg = config["model_cfg"], config["preprocess_cfg"]
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; train one: unclip train clip --out {folder}") from error
            size = model_cfg["vision_cfg"].get("image_size", 224)
            preprocess_cfg = preprocess_config(size if isinstance(size, int) else size[0]) | preprocess_cfg
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an open_clip config ({error})") from error
        if preprocess_cfg["resize_mode"] != "shortest" or preprocess_cfg["interpolation"] != "bicubic":
            how = f"{preprocess_cfg['interpolation']}, {preprocess_cfg['resize_mode']}"
            raise UserError(f"{path}: pictures are resized by bicubic, shortest; this model wants {how}")
        clip = cls(model_cfg, preprocess_cfg)
        tensors, _ = load_tensors(folder / WEIGHTS_FILE)
        load_weights(clip.model, tensors, folder / WEIGHTS_FILE)
        clip.fingerprint = fingerprint_files([path, folder / WEIGHTS_FILE], folder)
        return clip.to(device).eval().requires_grad_(False)

    def save(self, folder: Path | str, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write what `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads; `weights` (EMA) go first."""
        folder = Path(folder)
        config = {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}
        write_file(folder / CONFIG_FILE, json.dumps(config, indent=1).encode())
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
            raise UserError(f"models with the {text['hf_tokenizer_name']} tokenizer are not supported yet")
        return open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Token ids (B, context) int64; longer captions are cut, the end token kept."""
        # a 10,000-character caption costs as much as one that fills the context several times over
        limit = 32 * self.tokenizer.context_length
        return self.tokenizer([caption[:limit] for caption in captions])

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """pixels (B, 3, S, S) uint8 or 0..255 float, tokens (B, T) -> image rows, text rows (unit), logit scale."""
        return self._image_rows(pixels), self._text_rows(tokens), self.model.logit_scale.exp()

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
        tokens = _cut(self.tokenize(captions).to(self.device))
        return self._text_states(tokens).float(), _real(tokens)

    def _image_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        with _fast_attention(self.device):
            return F.normalize(self.model.encode_image((pixels - self.mean) / self.std).float(), dim=-1)

    def _text_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        model = self.model
        if not hasattr(model, "token_embedding") or model.text_pool_type != "argmax":
            with _fast_attention(self.device):
                return F.normalize(model.encode_text(tokens).float(), dim=-1)
        tokens = _cut(tokens)
        states = self._text_states(tokens)
        pooled = states[torch.arange(len(tokens), device=tokens.device), tokens.argmax(-1)]  # the end token's state
        projection = model.text_projection
        rows = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return F.normalize(rows.float(), dim=-1)

    def _text_states(self, tokens: torch.Tensor) -> torch.Tensor:
        model, length = self.model, tokens.shape[1]
        states = model.token_embedding(tokens) + model.positional_embedding[:length]
        mask = model.attn_mask[:length, :length] if model.attn_mask is not None else None
        with _fast_attention(self.device):
            return model.ln_final(model.transformer(states, attn_mask=mask))


def _cut(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, T) without the padding that the whole batch shares: the tower is causal, so nothing else changes."""
    return tokens[:, : int(tokens.argmax(-1).max()) + 1]


def _real(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(-1, keepdim=True)


def _fast_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """On CPUs, attention as plain matrix products: the fused bf16 kernel is about half as fast there."""
    if device.type != "cpu":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
