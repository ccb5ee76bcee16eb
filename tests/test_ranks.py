"""Two processes on this machine, talking over gloo, as torchrun starts them."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import tiny
import torch
import torch.nn.functional as F
from test_train import CONFIG, FIT

from clip_train.loss import contrastive_loss, same_caption
from clip_train.model import Clip
from clip_train.train import train_clip

WORKER = """
import sys, torch, torch.distributed as dist
from torch import nn
from clip_train import ranks
from clip_train.loss import contrastive_loss, same_caption
torch.set_num_threads(1)
ranks.start("cpu")
torch.manual_seed(0)
image_net, text_net = nn.Linear(6, 5), nn.Linear(6, 5)
class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = image_net, text_net
    def forward(self, x, y):
        return nn.functional.normalize(self.image(x), dim=-1), nn.functional.normalize(self.text(y), dim=-1)
both = nn.parallel.DistributedDataParallel(Both())
data = torch.load(sys.argv[1], weights_only=True)
half = slice(4 * ranks.rank(), 4 * ranks.rank() + 4)
image, text = both(data["x"][half], data["y"][half])
same = same_caption(ranks.gather_rows(data["group"][half]))
loss = contrastive_loss(ranks.gather_rows(image), ranks.gather_rows(text), torch.tensor(10.0), same)
loss.backward()
assert ranks.broadcast("main" if ranks.is_main() else "other") == "main"
if ranks.is_main():
    torch.save({"loss": loss.detach(), "image": image_net.weight.grad, "text": text_net.weight.grad}, sys.argv[2])
ranks.barrier()
dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_two(script: list[str]) -> None:
    """What torchrun --nproc-per-node 2 does, without its launcher's seconds."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parent.parent)
    workers = [
        subprocess.Popen(
            [sys.executable, *script],
            env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    errors = [w.communicate(timeout=120)[1] for w in workers]
    assert [w.returncode for w in workers] == [0, 0], errors


def test_loss_and_gradients_of_two_ranks_equal_those_of_one(tmp_path):
    torch.manual_seed(1)
    data = {"x": torch.randn(8, 6), "y": torch.randn(8, 6), "group": torch.tensor([0, 1, 2, 3, 1, 5, 6, 0])}
    torch.save(data, tmp_path / "data.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    run_two([str(tmp_path / "worker.py"), str(tmp_path / "data.pt"), str(tmp_path / "out.pt")])
    two = torch.load(tmp_path / "out.pt", weights_only=True)

    torch.manual_seed(0)
    image_net, text_net = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
    image, text = F.normalize(image_net(data["x"]), dim=-1), F.normalize(text_net(data["y"]), dim=-1)
    loss = contrastive_loss(image, text, torch.tensor(10.0), same_caption(data["group"]))
    loss.backward()
    assert torch.allclose(two["loss"], loss)
    assert torch.allclose(two["image"], image_net.weight.grad, atol=1e-6)
    assert torch.allclose(two["text"], text_net.weight.grad, atol=1e-6)


TRAIN = """
import sys, dataclasses, torch
sys.path.insert(0, "tests")
from test_train import CONFIG, FIT
from clip_train.train import train_clip
torch.set_num_threads(1)
config = dataclasses.replace(CONFIG, augment=0.0)
made = train_clip(sys.argv[1], sys.argv[2], config, FIT, device="cpu")
assert made.result["steps"] == 6
assert train_clip(sys.argv[1], sys.argv[2], config, FIT, device="cpu") == made  # and finds it done
torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
"""


def test_clip_trained_by_two_ranks_equals_clip_trained_by_one(tmp_path):
    tiny.shards(tmp_path / "shards")
    (tmp_path / "train.py").write_text(TRAIN)
    run_two([str(tmp_path / "train.py"), str(tmp_path / "shards"), str(tmp_path / "two")])
    config = dataclasses.replace(CONFIG, augment=0.0)
    train_clip(tmp_path / "shards", tmp_path / "one", config, FIT, device="cpu")
    # the models, not the weights: keys' biases have no gradient but rounding, which Adam blows up to whole steps
    one, two = (Clip.load(tmp_path / name) for name in ("one", "two"))
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = [f"picture number {i}" for i in range(8)]
    assert torch.allclose(one.encode_image(pixels), two.encode_image(pixels), atol=1e-4)
    assert torch.allclose(one.encode_text(captions), two.encode_text(captions), atol=1e-4)
    assert torch.allclose(one.model.logit_scale, two.model.logit_scale, atol=1e-5)
