"""In which numbers a forward pass computes: fp32, bf16, or fp16 with a scaled loss."""

import contextlib

import torch

from clip_train.settings import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
FP16_DEVICES = ("cuda",)


def resolved_precision(precision: str, device: torch.device) -> str:
    """ "auto" as what it comes to on this hardware: "bf16" where it multiplies bf16 natively, else "fp32"."""
    if precision == "fp16" and device.type not in FP16_DEVICES:
        raise UserError(f"precision fp16 needs a CUDA GPU, not {device.type}; use bf16, fp32 or auto")
    if precision != "auto":
        return precision
    return "bf16" if _multiplies_bf16(device) else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """What a forward pass runs in, see resolved_precision. One context for one pass: it keeps the weights it cast."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolved_precision(precision, device))
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


class LossScale:
    """fp16's factor on the loss, which keeps small gradients from becoming 0; 1 and without effect otherwise.

    Dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2) with torch.amp.GradScaler's numbers:
    a step whose gradients are not finite is left out and halves the factor, 2000 good ones in a row double it.
    It is told of the norm of all gradients, which is one number on all ranks and for sharded weights too.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        self.factor = 2.0**16 if on else 1.0
        self._good = 0

    def update(self, finite: bool) -> bool:
        """After each step: was its gradient finite? Returns False when nothing is left to try."""
        if not self.on:
            return finite
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.factor /= 2
        elif self._good % 2000 == 0:
            self.factor *= 2
        return self.factor >= 1

    def numbers(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"factor": self.factor, "good": self._good}

    def load(self, numbers: dict[str, float]) -> None:
        """Go on from numbers()."""
        if self.on and numbers:
            self.factor, self._good = numbers["factor"], int(numbers["good"])


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
