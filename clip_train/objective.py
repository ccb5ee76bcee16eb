"""What a step of CLIP training does with a batch: pictures are moved, both towers run, a loss is taken of the rows."""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from clip_train import ranks
from clip_train.augment import augment
from clip_train.fit import Batch
from clip_train.loss import (
    contrastive_loss,
    distillation_loss,
    right_share,
    same_caption,
    sigmoid_chance,
    sigmoid_loss,
)
from clip_train.settings import UserError

if TYPE_CHECKING:
    from clip_train.model import Clip

LOSSES = ("infonce", "siglip")


class ClipObjective:
    """fit()'s loss of CLIP, split in two so that a batch may be larger than the memory: see fit.RowsLoss.

    A batch holds "pixels" uint8 (B, 3, S, S), "tokens" int64 (B, T), and "caption" and "group" int64 (B,): pairs that
    agree in either are right answers for each other. `last_rows` are the rows of this rank in the last step, image and
    text (b, D), without gradients.
    """

    def __init__(
        self,
        *,
        loss: str,
        augment: float,
        teacher: "Clip | None" = None,
        distill: float = 0.0,
        smoothing: float = 0.0,
    ) -> None:
        """loss: "infonce" or "siglip" (the model needs a logit_bias). augment: strength, see augment.py.

        teacher: a CLIP whose probabilities over the batch are imitated; it sees the same moved pictures, at its own
        size. distill: how much of the loss that imitation is, in [0, 1]; MobileCLIP calls it lambda.
        smoothing: share of infonce's targets that is spread over the whole batch.
        """
        if loss not in LOSSES:
            raise UserError(f"loss {loss!r} must be {' or '.join(LOSSES)}")
        if not 0 <= distill <= 1:
            raise UserError(f"distill {distill:g} must be in [0, 1]")
        if not 0 <= smoothing < 1 or smoothing and loss != "infonce":
            raise UserError(f"smoothing {smoothing:g} must be in [0, 1), and 0 with a loss other than infonce")
        if (teacher is None) != (distill == 0):
            raise UserError(f"a teacher and distill above 0 need each other; distill is {distill:g}")
        self.kind = loss
        self.augment = augment
        self.teacher = teacher.eval().requires_grad_(False) if teacher else None
        self.distill = distill
        self.smoothing = smoothing
        self.last_rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def rows(self, model: nn.Module, part: Batch, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Image rows and text rows (b, D); with a teacher, its two; then the scale, and the bias where there is one.

        The teacher's rows stay in `part`, so that a second pass over the same part does not make them again.
        """
        pixels = augment(part["pixels"], self.augment, rng)
        image, text, *scalars = model(pixels, part["tokens"])
        if not self.teacher:
            return image, text, *scalars
        if "teacher_image" not in part:
            part["teacher_image"], part["teacher_text"] = self._teach(pixels, part["tokens"])
        return image, text, part["teacher_image"], part["teacher_text"], *scalars

    def loss(self, rows: tuple[torch.Tensor, ...], batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of this rank's rows against those of all ranks, and what to log: chance level, scale, bias."""
        image, text = rows[:2]
        scale, *bias = (r for r in rows if r.ndim < 2)
        if self.kind == "siglip" and not bias:
            raise UserError("loss siglip needs a model with a logit_bias: set init_logit_bias, e.g. -10, in its config")
        self.last_rows = image.detach(), text.detach()
        ids, size = (batch["group"], batch["caption"]), len(image) * ranks.world_size()
        with torch.autocast(image.device.type, enabled=False):
            if self.kind == "siglip":
                loss = sigmoid_loss(image, text, scale, bias[0], ids)
                chance = sigmoid_chance(right_share(*ids), size)
                numbers = {"chance": chance, "scale": scale.detach(), "bias": bias[0].detach()}
            else:
                right = same_caption(*ids)
                loss = contrastive_loss(image, text, scale, right, self.smoothing)
                loss = loss + 0 * sum(bias)  # DDP waits for weights that are left out
                numbers = {"chance": math.log(size), "scale": scale.detach()}
            if self.teacher:
                taught = distillation_loss(image, text, scale, *rows[2:4], self.teacher.model.logit_scale.exp())
                loss = (1 - self.distill) * loss + self.distill * taught
                numbers["distill"] = taught.detach()
        return loss, numbers

    @torch.no_grad()
    def _teach(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        teacher = self.teacher
        if teacher.device != pixels.device:
            teacher.to(pixels.device)
        size = teacher.image_size
        if size != pixels.shape[-1]:
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        image, text, *_ = teacher(pixels, as_long_as(tokens, teacher.model_cfg["text_cfg"].get("context_length", 77)))
        return image, text


def as_long_as(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Tokens (B, T) of open_clip's tokenizer as it would have made them for a context of `length`, or cut to T."""
    if tokens.shape[1] < length:
        return F.pad(tokens, (0, length - tokens.shape[1]))
    cut = tokens[:, :length].clone()
    end = tokens.max(1).values  # the end token has the highest number of the vocabulary
    cut[:, -1] = torch.where((cut != end[:, None]).all(1), end, cut[:, -1])
    return cut
