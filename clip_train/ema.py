"""The exponential moving average of a model's weights while it trains."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from clip_train.parallel import local


class Average:
    """Averaged weights and buffers, on the model's device and sharded as it is; made at the first weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """decay: of the average, in (0, 1); in the first steps a smaller one, so that the start is forgotten."""
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the weights after `step` steps."""
        current = {name: local(t) for name, t in model.state_dict().items()}
        floating = [name for name, t in current.items() if t.is_floating_point()]
        pull = 1 - min(self.decay, step / (step + 9))
        torch._foreach_lerp_([local(self.tensors[n]) for n in floating], [current[n] for n in floating], pull)
        for name in current.keys() - set(floating):
            self.tensors[name].copy_(current[name])

    @contextlib.contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average meanwhile, and afterwards its weights again, bit for bit."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        swapped = set()
        for name, tensor in model.state_dict().items():
            mine, theirs = local(self.tensors[name]), local(tensor)
            if theirs.data_ptr() not in swapped:  # tied weights have several names
                swapped.add(theirs.data_ptr())
                kept = theirs.clone()
                theirs.copy_(mine)
                mine.copy_(kept)
