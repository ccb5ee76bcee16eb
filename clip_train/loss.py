"""What CLIP training minimises."""

import torch
import torch.nn.functional as F


def contrastive_loss(
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    logit_scale: torch.Tensor,
    same: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE: each picture picks its caption out of the batch, and back.

    CLIP, figure 3 (Radford et al. 2021, arXiv 2103.00020). Where `same` holds, a pair's caption is a right answer for
    another pair's picture too and shares the target equally, as in SupCon (Khosla et al. 2020, arXiv 2004.11362,
    L_out): two pictures with one caption do not push it away from each other.
    image_emb, text_emb: (B, D), unit rows; row i of both is one pair. logit_scale: scalar > 0.
    same: (B, B) bool, symmetric with a true diagonal; None: only the diagonal is right.
    Returns: scalar in nats; chance level is log(B), so log it beside the loss.
    """
    logits = logit_scale * image_emb @ text_emb.T  # (B, B)
    if same is None:
        target = torch.arange(len(logits), device=logits.device)
    else:
        target = same / same.sum(1, keepdim=True)  # (B, B), rows sum to 1
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def same_caption(*ids: torch.Tensor) -> torch.Tensor:
    """(B, B) bool: which pairs are each other's right answer, because any of the given ids (B,) agree."""
    return torch.stack([i[:, None] == i[None, :] for i in ids]).any(0)
