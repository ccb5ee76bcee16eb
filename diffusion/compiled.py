"""A denoiser translated by torch.compile; on CUDA into one graph, replayed without the CPU in between."""

import torch
from torch import Tensor, nn

from clip_train.settings import UserError
from diffusion.denoiser import Cond


class Compiled:
    """Called like the denoiser. Each batch size is translated once, at its first call, which takes about a minute.

    So a batch is filled up to a size that has been met, if one is at most twice as large. Outputs are copied: a CUDA
    graph writes the next ones over them, and samplers keep the last.
    """

    def __init__(self, denoiser: nn.Module):
        self.denoiser, self.network = denoiser, denoiser.network
        self.on_gpu = next(denoiser.parameters()).is_cuda
        mode = "reduce-overhead" if self.on_gpu else "default"
        self.translated = torch.compile(denoiser, mode=mode, dynamic=False)
        self.sizes: set[int] = set()

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        count = len(x)
        size = min((met for met in self.sizes if count <= met <= 2 * count), default=count)
        if size > count:
            x, sigma = filled(x, size), filled(sigma, size)
            cond = {name: filled(value, size) for name, value in cond.items()}
        if self.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            denoised = self.translated(x, sigma, cond)
        except RuntimeError as error:
            if self.sizes:
                raise
            why = " ".join(str(error).split())[:150]  # no compiler on this machine, or a layer torch cannot translate
            raise UserError(f"torch.compile cannot translate this decoder here ({why}); leave it out") from error
        self.sizes.add(size)
        return denoised[:count].clone()


def filled(values: Tensor, size: int) -> Tensor:
    """(B, ...) with its last row repeated until there are `size`."""
    return torch.cat([values, values[-1:].expand(size - len(values), *values.shape[1:])])
