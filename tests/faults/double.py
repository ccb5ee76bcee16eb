"""The library's own code in float64: the truth that float32 and bf16 are held against."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Inside, .float() means .double(), and what is drawn at random has the values that float32 would have."""

    def wider(draw: Callable) -> Callable:
        return lambda *shape, **how: draw(*shape, **{"dtype": torch.float32} | how).double()

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
            mock.patch.object(torch, "rand", wider(torch.rand)),
            mock.patch.object(torch, "randn", wider(torch.randn)),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def doubled(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with the same weights in float64."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "pixel_dtype"):  # a Clip's pixels are of a type of their own
        model.pixel_dtype = torch.float64
    return model


def wide(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch whose floating-point tensors are float64."""
    return {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
