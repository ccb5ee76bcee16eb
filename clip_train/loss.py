"""What CLIP training minimises.

Under torchrun every function takes this rank's rows and gathers what it needs; the mean of the ranks' losses is the
loss of the whole batch, and so are the gradients once they are averaged, as DDP and FSDP do.
b: rows of this rank; B: rows of all ranks together (b = B in a single process).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from clip_train import ranks

SIGMOID_CHUNK = 1024  # pictures whose logits stand in memory at once


def contrastive_loss(
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    logit_scale: torch.Tensor,
    same: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Symmetric InfoNCE: each picture picks its caption out of the batch, and back.

    CLIP, figure 3 (Radford et al. 2021, arXiv 2103.00020). Where `same` holds, a pair's caption is a right answer for
    another pair's picture too and shares the target equally, as in SupCon (Khosla et al. 2020, arXiv 2004.11362,
    L_out): two pictures with one caption do not push it away from each other. Each rank computes (b, B) logits.
    image_emb, text_emb: (b, D), unit rows; row i of both is one pair. logit_scale: scalar > 0.
    same: (b, B) bool, see same_caption; None: only the own caption is right. smoothing: share of each target that is
    spread evenly over the batch (Szegedy et al. 2015, arXiv 1512.00567, section 7).
    Returns: scalar in nats; chance level is log(B), so log it beside the loss.
    """
    to_text = logit_scale * image_emb @ ranks.gather_rows(text_emb).T  # (b, B)
    to_image = logit_scale * text_emb @ ranks.gather_rows(image_emb).T
    if same is None:
        target = torch.arange(len(image_emb), device=image_emb.device) + ranks.rank() * len(image_emb)
    else:
        target = same / same.sum(1, keepdim=True)  # (b, B), rows sum to 1
    both = [F.cross_entropy(logits, target, label_smoothing=smoothing) for logits in (to_text, to_image)]
    return (both[0] + both[1]) / 2


def sigmoid_loss(
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    ids: Sequence[torch.Tensor] = (),
    chunk: int = SIGMOID_CHUNK,
) -> torch.Tensor:
    """SigLIP: every picture and caption of the batch is asked whether they belong together, each pair by itself.

    Zhai et al. 2023, arXiv 2303.15343, algorithm 1: -1/B sum over all pairs of log sigmoid(z (scale x.y + bias)), z = 1
    for right pairs and -1 for others. The captions travel around the ring of ranks (section 3.3), and logits exist for
    `chunk` pictures and one rank's captions at a time.
    image_emb, text_emb: (b, D), unit rows. logit_scale, logit_bias: scalars. ids: as given to same_caption; none: only
    the own caption is right. Returns: scalar in nats; knowing nothing costs sigmoid_chance(share of right pairs, B).
    """
    first = ranks.rank() * len(image_emb)
    number = torch.arange(first, first + len(image_emb), device=image_emb.device)
    own = [number, *ids]
    loss, (text, *theirs) = image_emb.new_zeros(()), (text_emb, *own)
    for step in range(ranks.world_size()):
        if step:
            text, *theirs = ranks.pass_on(text, *theirs)
        loss = loss + _SigmoidBlock.apply(image_emb, text, logit_scale, logit_bias, own, theirs, chunk)
    return loss / len(image_emb)


def sigmoid_chance(share: torch.Tensor | float, size: int) -> torch.Tensor:
    """What sigmoid_loss comes to when all logits are one constant, the best there is: B H(share) nats.

    share: of the B x B pairs that are right, see right_share; where all captions differ it is 1 / B, and the chance
    level is about log(B) + 1. size: B.
    """
    share = torch.as_tensor(share)
    return -size * (torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))


def distillation_loss(
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    logit_scale: torch.Tensor,
    teacher_image: torch.Tensor,
    teacher_text: torch.Tensor,
    teacher_scale: torch.Tensor,
) -> torch.Tensor:
    """KL divergence from the teacher's picture-to-caption probabilities over the batch to the student's, and back.

    MobileCLIP (Vasu et al. 2024, arXiv 2311.17049, equation 3), the mean of both directions.
    Rows (b, D) of this rank; the teacher's may be of another width. Returns: scalar in nats, 0 when both agree.
    """
    pairs = ((image_emb, text_emb, teacher_image, teacher_text), (text_emb, image_emb, teacher_text, teacher_image))
    loss = image_emb.new_zeros(())
    for rows, others, teacher_rows, teacher_others in pairs:
        student = (logit_scale * rows @ ranks.gather_rows(others).T).log_softmax(1)  # (b, B)
        teacher = (teacher_scale * teacher_rows @ ranks.gather_rows(teacher_others).T).log_softmax(1)
        loss = loss + F.kl_div(student, teacher, reduction="batchmean", log_target=True) / 2
    return loss


def same_caption(*ids: torch.Tensor) -> torch.Tensor:
    """(b, B) bool: whose captions are right for which pictures, because any of the given ids (b,) agree."""
    return _agree(ids, [ranks.gather_rows(i) for i in ids])


def right_share(*ids: torch.Tensor, chunk: int = SIGMOID_CHUNK) -> torch.Tensor:
    """Share of same_caption's (b, B) entries that hold, a scalar, without making them all at once."""
    everyone = [ranks.gather_rows(i) for i in ids]
    parts = zip(*(i.split(chunk) for i in ids), strict=True)
    right = torch.stack([_agree(part, everyone).sum() for part in parts]).sum()
    return right / (len(ids[0]) * len(everyone[0]))


def _agree(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([a[:, None] == b[None, :] for a, b in zip(mine, theirs, strict=True)]).any(0)


class _SigmoidBlock(torch.autograd.Function):
    """Sum of -log sigmoid(z logit) over pictures x captions; the gradients are made on the way, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        mine: list[torch.Tensor],
        theirs: list[torch.Tensor],
        chunk: int,
    ) -> torch.Tensor:
        loss = image.new_zeros(())
        d_image, d_text = torch.empty_like(image), torch.zeros_like(text)
        d_scale, d_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        for rows in torch.arange(len(image), device=image.device).split(chunk):
            cosine = image[rows] @ text.T  # (chunk, b)
            z = 2.0 * _agree([i[rows] for i in mine], theirs) - 1
            signed = z * (scale * cosine + bias)
            loss -= F.logsigmoid(signed).sum()
            d_logit = -z * torch.sigmoid(-signed)
            d_image[rows] = scale * (d_logit @ text)
            d_text += scale * (d_logit.T @ image[rows])
            d_scale += (d_logit * cosine).sum()
            d_bias += d_logit.sum()
        ctx.save_for_backward(d_image, d_text, d_scale, d_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return (*(gradient * d for d in ctx.saved_tensors), None, None, None)
