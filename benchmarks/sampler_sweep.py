"""Steps x eta x sampler on a trained decoder, and what becomes of DDPM without its noise.

    python benchmarks/sampler_sweep.py --decoder decoder --embeddings emb-val --out sweep

Shows on one's own data the shape of DDIM's table 1 (Song et al. 2020, arXiv 2010.02502): with few steps, eta 0 is
better than eta 1, and the difference shrinks as steps are added. And the ablation that leaves out the noise of each of
DDPM's steps: the variance of the pictures falls, and they are far from real ones. Resumed row by row; writes what
`unclip evaluate sweep` writes. Times are CPU seconds of one thread: set OMP_NUM_THREADS=1.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package
from clip_train.console import Bars, print_table  # noqa: E402
from diffusion.examine import Exam, Way, open_generator, open_held  # noqa: E402
from diffusion.generate import Sampling  # noqa: E402
from diffusion.report_figures import sweep_table  # noqa: E402
from diffusion.sweep import plan, sweep  # noqa: E402

ETAS = [0.0, 0.5, 1.0]


def settings(guidance: float, precision: str) -> list[Sampling]:
    """The rows, the cheap ones first."""
    how = Sampling(guidance=guidance, precision=precision)
    rows = plan(how, ["ddim"], [10], ETAS)
    rows.append(replace(how, sampler="ddpm_mean", steps=10))
    rows += plan(how, ["ddim"], [20], ETAS)
    rows += plan(how, ["dpmpp_2m", "unipc"], [10, 20])
    rows += plan(how, ["heun"], [5, 10])
    rows += plan(how, ["ddim"], [50], ETAS)
    rows.append(replace(how, sampler="ddpm_mean", steps=50))
    return rows + plan(how, ["ddim"], [100], ETAS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--out", type=Path, default=Path("sweep"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--features", nargs="+", default=["clip", "efficientnet-lite0"])
    asked = parser.parse_args()

    generator = open_generator(asked.decoder, None, asked.clip)
    held = open_held(asked.embeddings, None, generator)
    exam = Exam(count=asked.count, features=tuple(asked.features))
    rows = settings(asked.guidance, asked.precision)
    sweep(Way(generator), held, rows, asked.out, exam, on_progress=Bars("sampler sweep"))
    _, head, lines = sweep_table(json.loads((asked.out / "table.json").read_text()))
    print_table(head, lines)


if __name__ == "__main__":
    main()
