"""Run `unclip quickstart` in a process of its own and tabulate wall time, peak memory and the report's figures.

    python benchmarks/quickstart.py --out quickstart [--minutes 9]

Prints a markdown table; results/ holds dated ones. The folder must be new, or the time is that of what was left to do.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

FLOORS = [
    ("text->picture recall@10, train concepts", lambda r: r["clip"]["train"]["text_to_image"]["recall"]["R@10"]),
    ("text->picture recall@10, recombined words", lambda r: r["clip"]["recombined"]["text_to_image"]["recall"]["R@10"]),
    ("text->picture recall@10, unseen concepts", lambda r: r["clip"]["unseen"]["text_to_image"]["recall"]["R@10"]),
    ("chance of that", lambda r: r["clip"]["unseen"]["text_to_image"]["chance"]["R@10"]),
    ("cosine to the true image embedding, unseen: prior's sample", lambda r: r["prior"]["unseen"]["prior"]["cosine"]),
    ("same: the prior's mean (one step)", lambda r: r["prior"]["unseen"]["prior mean"]["cosine"]),
    ("same: ridge regression", lambda r: r["prior"]["unseen"]["ridge"]["cosine"]),
    ("same: text embedding as it is", lambda r: r["prior"]["unseen"]["text"]["cosine"]),
    ("same: mean image embedding", lambda r: r["prior"]["unseen"]["mean image"]["cosine"]),
    ("round trip, train: top 10 from the true embedding", lambda r: r["loop"]["train"]["true"]["top10"]),
    ("same from the caption, by the prior", lambda r: r["loop"]["train"]["prior"]["top10"]),
    ("same from the text embedding", lambda r: r["loop"]["train"]["text"]["top10"]),
    ("chance of that (train)", lambda r: r["loop"]["train"]["chance"]["top10"]),
    ("round trip, unseen: top 10 from the true embedding", lambda r: r["loop"]["unseen"]["true"]["top10"]),
    ("same from the caption, by the prior (unseen)", lambda r: r["loop"]["unseen"]["prior"]["top10"]),
    ("chance of that (unseen)", lambda r: r["loop"]["unseen"]["chance"]["top10"]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", default="9")
    options = parser.parse_args()
    fresh = not options.out.exists()
    began = time.monotonic()
    command = [sys.executable, "-m", "cli", "quickstart", "--out", str(options.out), "--minutes", options.minutes]
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"quickstart failed: {status}")
    report = json.loads((options.out / "report.json").read_text())
    print("| figure | value |\n|---|---|")
    if fresh:
        print(f"| wall time, imports included | {time.monotonic() - began:.0f} s |")
        stages = max(stage["peak_mb"] for stage in report["stages"].values())  # each stage starts its own count
        print(f"| peak memory | {max(stages, usage.ru_maxrss / 1024):.0f} MB |")
    for name, value in FLOORS:
        print(f"| {name} | {value(report):.3f} |")
    for name, stage in report["stages"].items():
        print(f"| stage: {name} | {stage['seconds']:.0f} s, {stage['peak_mb']:.0f} MB |")
    print("\n" + ", ".join(f"{k} {v}" for k, v in report["machine"].items()))


if __name__ == "__main__":
    main()
