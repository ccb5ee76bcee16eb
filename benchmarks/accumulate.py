"""A batch in one piece and in parts that still see all of it: CPU time, memory, loss and gradient of a CLIP step.

    python benchmarks/accumulate.py [--batch 256] [--parts 8]

ViT of width 256, 6 layers, 64 px, patch 8; text of width 256, 4 layers, captions of 10 tokens; fp32, one thread. Each
way runs in a process of its own, so that its peak memory is its own. Prints a markdown table.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package

from clip_train.gradients import make_gradients  # noqa: E402
from clip_train.model import Clip, preprocess_config  # noqa: E402
from clip_train.objective import ClipObjective  # noqa: E402
from clip_train.parallel import Team  # noqa: E402

MODEL = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 256, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.batch, options.one)))
        return
    print("| parts | CPU s a step | GB above start | loss | gradient norm of visual.proj |\n|---|---|---|---|---|")
    for parts in (1, options.parts):
        command = [sys.executable, __file__, "--batch", str(options.batch), "--one", str(parts)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {parts} | {found['seconds']:.2f} | {found['gb']:.2f} | {found['loss']:.6f} | {found['norm']:.6f} |")


def measure(count: int, parts: int) -> dict[str, float]:
    """Median of four steps on one made-up batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    team = Team(Clip(MODEL, preprocess_config(64)), "ddp", torch.device("cpu"))
    tokens = torch.zeros(count, 32, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1:9], tokens[:, 9] = 49406, torch.randint(1, 40000, (count, 8)), 49407
    pixels = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)
    batch = {"pixels": pixels, "tokens": tokens, "caption": torch.arange(count), "group": torch.arange(count)}
    objective = ClipObjective(loss="infonce", augment=0.0)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for step in range(4):
        team.model.zero_grad()
        tick = time.process_time()
        loss, _ = make_gradients(team, objective, batch, accumulate=parts, precision="fp32", seed=0, step=step)
        times.append(time.process_time() - tick)
    return {
        "seconds": statistics.median(times),
        "gb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6,
        "loss": float(loss),
        "norm": float(team.model.model.visual.proj.grad.norm()),
    }


if __name__ == "__main__":
    main()
