"""Does `unclip evaluate clip` say what CLIP_benchmark says of the same model on the same data?

    python -m venv peer && peer/bin/pip install clip_benchmark==1.6.2 requests 'numpy<2.4' open_clip_torch==3.3.0
    python benchmarks/clip_benchmark_agreement.py --shards 'D/val-*.tar' --clip clip --peer-python peer/bin/python \\
        --out benchmarks/results/clip-benchmark-agreement.md

Builds CLIP_benchmark's layout from shards (three data sets below --work): zero-shot classification of the labels;
retrieval with all captions, among pictures that share no caption; and retrieval among all pictures, where captions
that several pictures share tie exactly: there the peer's figure hangs on the order in which torch.topk puts equal
scores, ours counts a tie as lost, so only bounds can be compared. Without --peer-python it builds and prints ours.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package
from clip_train import zeroshot
from clip_train.evaluate import embed_shards, evaluate_clip
from clip_train.model import Clip
from clip_train.shards import ShardSet

NAMES = {"image_retrieval_recall": "text_to_image", "text_retrieval_recall": "image_to_text"}
KS = (1, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--label-field", default="label")
    parser.add_argument("--peer-python", type=Path, help="python of an environment with clip_benchmark")
    parser.add_argument("--work", type=Path, help="where the layout is built; by default a temporary folder")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the table to this markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        names = build(ShardSet(options.shards), options.label_field, work)
        ours = own_figures(work, options.clip, names, options.batch_size)
        peer = peer_figures(work, options.clip, options.peer_python, options.batch_size) if options.peer_python else {}
        bounds = tie_bounds(work / "retrieval_all", options.clip)
    text = report(options, ours, peer, bounds)
    print(text)
    if options.out:
        options.out.write_text(text)


def build(shards: ShardSet, label_field: str, work: Path) -> list[str]:
    """CLIP_benchmark's folders classification/, retrieval/ and retrieval_all/. Returns the class names."""
    labels = [shards.label(i, label_field) for i in range(len(shards))]
    names = sorted({label for label in labels if label})
    place = {name: i for i, name in enumerate(names)}
    captions = [shards.captions(i) for i in range(len(shards))]
    taken: set[str] = set()
    alone = []
    for i, own in enumerate(captions):  # the first picture of each set of captions
        if taken.isdisjoint(own):
            alone.append(i)
        taken.update(own)
    labelled = [i for i, label in enumerate(labels) if label]
    write_folder(work / "classification", shards, labelled, "cls", lambda i: str(place[labels[i]]))
    (work / "classification" / "classnames.txt").write_text("\n".join(names))
    templates = "\n".join(zeroshot.TEMPLATES)
    (work / "classification" / "zeroshot_classification_templates.txt").write_text(templates)
    for folder, rows in (("retrieval", alone), ("retrieval_all", range(len(shards)))):
        write_folder(work / folder, shards, rows, "txt", lambda i: "\n".join(captions[i]))
        (work / folder / "dataset_type.txt").write_text("retrieval")
    return names


def write_folder(folder: Path, shards: ShardSet, rows: Iterable[int], suffix: str, said) -> None:
    """FOLDER/test/0.tar and nshards.txt: each picture with one other member."""
    (folder / "test").mkdir(parents=True, exist_ok=True)
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for i in rows:
            sample = shards.read(i)
            for name, data in ((sample.ext, sample.image), (suffix, said(i).encode())):
                member = tarfile.TarInfo(f"{sample.key}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def own_figures(work: Path, clip: Path, names: list[str], size: int) -> dict[str, dict[str, float]]:
    """Our figures on the three folders, under the peer's names."""
    templates = zeroshot.read_lines(work / "classification" / "zeroshot_classification_templates.txt", "templates")
    options = {"captions": "none", "classnames": names, "templates": templates, "batch_size": size}
    found = evaluate_clip(work / "classification" / "test", clip, "cls", **options)["zero_shot"]
    figures = {"classification": {key: found[key] for key in ("acc1", "acc5", "mean_per_class_recall")}}
    figures["classification"]["pictures"] = found["samples"]
    for name in ("retrieval", "retrieval_all"):
        options = {"captions": "lines", "pairs_only": True, "classnames": (), "batch_size": size}
        found = evaluate_clip(work / name / "test", clip, **options)
        both = {f"{theirs}@{k}": found[own]["recall"][f"R@{k}"] for theirs, own in NAMES.items() for k in KS}
        figures[name] = {**both, "pictures": found["samples"], "captions": found["captions"]}
    return figures


def peer_figures(work: Path, clip: Path, python: Path, size: int) -> dict[str, dict[str, float]]:
    """CLIP_benchmark's figures on the same folders, by its own command."""
    figures = {}
    for name in ("classification", "retrieval", "retrieval_all"):
        task = "zeroshot_classification" if name == "classification" else "zeroshot_retrieval"
        out = work / f"{name}.json"
        command = [str(python.absolute().with_name("clip_benchmark")), "eval", "--dataset", f"wds/{name}"]
        command += ["--dataset_root", str(work / name), "--split", "test", "--model", f"local-dir:{clip.resolve()}"]
        command += ["--pretrained", "none", "--task", task, "--batch_size", str(size), "--num_workers", "0"]
        command += ["--no_amp", "--output", str(out), "--recall_k", *map(str, KS)]
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, check=True, env=quiet, capture_output=True, text=True)
        figures[name] = json.loads(out.read_text())["metrics"]
    return figures


def tie_bounds(folder: Path, clip: Path, near: float = 1e-5) -> dict[str, tuple[float, float]]:
    """The recalls when every tie (to `near`, what float32 leaves of one) is lost, and when every tie is won."""
    made = embed_shards(folder / "test", Clip.load(clip), captions="lines", pairs_only=True)
    scores = made.text @ made.image.T
    right = made.owner[:, None] == np.arange(len(made.image))
    bounds = {}
    for theirs, (s, r) in {
        "image_retrieval_recall": (scores, right),
        "text_retrieval_recall": (scores.T, right.T),
    }.items():
        best = np.where(r, s, -np.inf).max(1, keepdims=True)
        lost, won = (1 + ((s > best + shift) & ~r).sum(1) for shift in (-near, near))
        for k in KS:
            bounds[f"{theirs}@{k}"] = (float((lost <= k).mean()), float((won <= k).mean()))
    return bounds


def report(options: argparse.Namespace, ours: dict, peer: dict, bounds: dict[str, tuple[float, float]]) -> str:
    """A markdown page: both sides, their differences, and where they cannot agree."""
    model = json.loads((options.clip / "open_clip_config.json").read_text())
    lines = [
        f"# unclip evaluate clip beside CLIP_benchmark, {date.today()}",
        "",
        f"Model: {model['model_cfg']}",
        "",
        f"Data: {Path(options.shards).name}, labels by {options.label_field}; batch size {options.batch_size}, fp32",
        "",
        f"Machine: {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"open_clip {metadata.version('open_clip_torch')}; peer: {peer_version(options.peer_python)}",
        "",
        "| data set | figure | CLIP_benchmark | unclip | difference |",
        "|---|---|---|---|---|",
    ]
    largest = 0.0
    for name in ("classification", "retrieval"):
        own = ours[name]
        size = f"{own['pictures']} pictures" + (f", {own['captions']} captions" if "captions" in own else "")
        for key, value in own.items():
            if key in ("pictures", "captions"):
                continue
            theirs = peer.get(name, {}).get(key)
            apart = "" if theirs is None else f"{value - theirs:+.6f}"
            largest = max(largest, abs(value - theirs) if theirs is not None else 0)
            said = "-" if theirs is None else f"{theirs:.6f}"
            lines.append(f"| {name} ({size}) | {key} | {said} | {value:.6f} | {apart} |")
    if peer:
        lines += ["", f"Largest difference: {largest:.1e} (goal: at most 1e-4)."]
    own = ours["retrieval_all"]
    lines += [
        "",
        f"## All {own['pictures']} pictures: captions that several pictures share",
        "",
        "Each picture's own captions alone count as right here. A caption of another drawing of the same thing scores",
        "exactly as much; torch.topk puts such equals in an order of its own, so the peer's figure lies somewhere",
        "between every tie lost (which is what we report) and every tie won.",
        "",
        "| figure | every tie lost | unclip | CLIP_benchmark | every tie won |",
        "|---|---|---|---|---|",
    ]
    inside = True
    for key, (low, high) in bounds.items():
        theirs = peer.get("retrieval_all", {}).get(key)
        inside &= theirs is None or low - 1e-4 <= theirs <= high + 1e-4
        said = "-" if theirs is None else f"{theirs:.4f}"
        lines.append(f"| {key} | {low:.4f} | {own[key]:.4f} | {said} | {high:.4f} |")
    if peer:
        lines += ["", "The peer lies inside its bounds." if inside else "The peer lies OUTSIDE its bounds."]
    return "\n".join(lines) + "\n"


def peer_version(python: Path | None) -> str:
    """What the peer's environment holds."""
    if python is None:
        return "not run"
    code = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in "
    code += "('clip_benchmark', 'open_clip_torch', 'torch', 'webdataset')), sep=', ')"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
