"""torchrun itself: a rank that dies is started again together with the others, and training goes on."""

import os
import subprocess
import sys
from pathlib import Path

import crew
import torch

WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import crew
from clip_train import ranks

folder = Path(sys.argv[2])
torch.set_num_threads(1)
if (folder / "died").exists():  # the second time, rank 1 must not find rank 0 at its old address
    if os.environ["RANK"] == "1":
        (folder / "waiting").touch()
    while os.environ["RANK"] == "0" and not (folder / "waiting").exists():
        time.sleep(0.1)
    time.sleep(1.5 * (os.environ["RANK"] == "0"))
ranks.start("cpu")
plain = crew.batches

def batches(**how):
    def from_step(start):
        with open(folder / f"started-{ranks.rank()}", "a") as file:
            file.write(f"{start}\\n")
        for step, batch in enumerate(plain(**how)(start), start):
            if step == 3 and ranks.rank() == 1 and not (folder / "died").exists():
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch
    return from_step

crew.batches = batches
made = crew.train(folder / "run", save_every=0.0)
if ranks.is_main():
    torch.save(made, folder / "made.pt")
ranks.leave()
"""


def test_training_whose_rank_was_killed_and_restarted_by_torchrun_equals_training_unbroken(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    launch = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, str(tmp_path / "worker.py")]
        + [str(Path(__file__).parent), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        first, again = (tmp_path / f"started-{rank}").read_text().split()
        assert first == "0" and again in ("2", "3")  # from the last checkpoint, not from the beginning
    made = torch.load(tmp_path / "made.pt", weights_only=True)
    assert crew.difference(crew.train(tmp_path / "one"), made) < 1e-5
