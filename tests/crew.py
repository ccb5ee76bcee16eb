"""Several ranks on this machine, talking over gloo, and a small model of pairs for them to train.

The ranks are forked from a server that has imported torch already: what torchrun does, without its seconds.
"""

import multiprocessing
import os
import socket
import traceback
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from clip_train import ranks
from clip_train.fit import FitConfig, fit
from clip_train.objective import ClipObjective

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["open_clip", "pytest", "diffusion.train_prior", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
)


def run(count, work, *arguments, expect=None):
    """work(*arguments) on `count` ranks of one group, each ending through ranks.leave(); checks their exit codes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(count)}
    members = [
        _processes.Process(target=_member, args=(address | {"RANK": str(r), "LOCAL_RANK": str(r)}, work, arguments))
        for r in range(count)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(300)
    codes = [member.exitcode for member in members]
    for member in members:
        member.kill()
    assert codes == (expect or [0] * count)


def _member(environment, work, arguments):
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    code = 1
    try:
        ranks.start("cpu")
        work(*arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    ranks.leave(code)


class Towers(nn.Module):
    """Two small towers with all that training has to get right: blocks, odd widths, dropout, BatchNorm, scalars."""

    def __init__(self, dropout=0.0, norm=False, bias=False):
        super().__init__()
        middle = nn.BatchNorm1d(17) if norm else nn.LayerNorm(17)
        self.image = nn.Sequential(nn.Linear(48, 17), middle, nn.GELU(), nn.Dropout(dropout), nn.Linear(17, 7))
        self.table = nn.Embedding(50, 12)
        self.text = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 7)])
        self.shift = nn.Parameter(torch.zeros(1, 12))  # fewer rows than ranks
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0)) if bias else None

    def encode_image(self, pixels):
        return F.normalize(self.image(pixels.flatten(1) / 255), dim=-1)

    def forward(self, pixels, tokens):
        words = self.table(tokens).mean(1)
        text = F.normalize(self.text[1](self.text[0](words + self.shift).tanh()), dim=-1)
        out = self.encode_image(pixels), text, self.logit_scale.exp()
        return out if self.logit_bias is None else (*out, self.logit_bias + 0.0)


class Killed(Exception):
    pass


def batches(size=24, stop=None):
    """This rank's share of batches of pairs, some of one caption; the step `stop` raises Killed on every rank."""

    def from_step(step):
        while step != stop:
            rng = torch.Generator().manual_seed(step)
            whole = {
                "pixels": torch.randint(0, 256, (size, 3, 4, 4), generator=rng, dtype=torch.uint8),
                "tokens": torch.randint(0, 50, (size, 5), generator=rng),
                "caption": torch.randint(0, size, (size,), generator=rng),
                "group": torch.randint(0, 3 * size, (size,), generator=rng),
            }
            share = size // ranks.world_size()
            yield {name: t[ranks.rank() * share :][:share] for name, t in whole.items()}
            step += 1
        raise Killed

    return from_step


def train(folder, loss="infonce", dropout=0.0, norm=False, stop=None, seed=0, validate=None, **settings):
    """Fit Towers in `folder`; returns (weights, averaged weights, loss), or None if it was stopped."""
    Path(folder).mkdir(exist_ok=True)
    torch.manual_seed(seed)
    model = Towers(dropout, norm, bias=loss == "siglip")
    usual = {"steps": 6, "batch_size": 24, "lr": 0.01, "precision": "fp32", "log_every": 1, "ema": 0.9}
    objective = ClipObjective(loss=loss, augment=0.3 if dropout else 0.0)
    try:
        done = fit(
            model, batches(stop=stop), objective, FitConfig(**usual | settings), Path(folder), validate=validate
        )  # fmt: skip
    except Killed:
        return None
    return model.state_dict(), done.averaged, done.loss


def difference(one, other):
    """Largest difference between the (averaged) weights and losses that two trainings ended with."""
    weights = max(float((one[i][n] - other[i][n]).abs().max()) for i in (0, 1) for n in one[0])
    return max(weights, abs(one[2] - other[2]))
