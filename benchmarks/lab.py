"""Every number of `unclip lab`, for several seeds: a markdown table of claims, bands, values and seconds.

    python benchmarks/lab.py --run . --embeddings emb-val --image fox.png --seeds 0,1,2 --out lab-seeds

--run: a folder that holds clip, prior, decoder and embeddings, see `unclip lab all --help`. Each part's folder
(figures, numbers.json) is kept in OUT/SEED/PART; one that is there is not run again, and then shows no seconds.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package

from clip_train.console import Bars  # noqa: E402
from diffusion.lab.experiment import Finding, read_numbers, run_part  # noqa: E402
from diffusion.lab.run import Run  # noqa: E402
from diffusion.lab.story import story_of  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="parts, such as spiral,sampling; default: all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    run = Run.find(options.run, options.embeddings)
    found: dict[str, dict[str, list[Finding]]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in seeds:
        story = story_of(run, image=options.image, seed=seed)
        for part in story.parts:
            if options.only and part.name not in options.only.split(","):
                continue
            folder = options.out / str(seed) / part.name
            fresh, began = not folder.exists(), time.monotonic()
            run_part(part, folder, Bars(f"{part.name} {seed}"))
            if fresh:
                seconds.setdefault(part.name, []).append(time.monotonic() - began)
            for one in read_numbers(folder)["findings"]:
                found.setdefault(part.name, {}).setdefault(one["name"], []).append(Finding.from_json(one))
    for name, claims in found.items():
        took = ", ".join(f"{one:.0f}" for one in seconds.get(name, []))
        print(f"\n## unclip lab {name}" + (f" ({took} s)" if took else "") + "\n")
        print("| claim | " + " | ".join(f"seed {seed}" for seed in seeds) + " | asked for (seed 0) | holds |")
        print("|---|" + "---|" * (len(seeds) + 2))
        for values in claims.values():
            first = values[0]
            cells = [first.says, *(one.found for one in values), first.asked]
            print(f"| {' | '.join(cells)} | {sum(one.holds for one in values)} of {len(values)} |")
    every = [one.holds for claims in found.values() for values in claims.values() for one in values]
    print(f"\n{len(every) - sum(every)} of {len(every)} do not hold", file=sys.stderr)


if __name__ == "__main__":
    main()
