"""The whole loop on the demo's pictures: every stage through the function its own command calls, then a report.

This file alone in diffusion/ may import retrieval/: it is the one place where all the rooms meet.
"""

import json
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_train import metrics, presets, ranks, train
from clip_train.demo import write_demo
from clip_train.embed import embed
from clip_train.folder import read_manifest, write_file
from clip_train.settings import Progress, UserError
from clip_train.sheet import contact_sheet, query_sheet, save_sheet
from clip_train.store import EmbeddingStore
from diffusion.evaluate import evaluate_loop
from diffusion.evaluate_prior import evaluate_prior
from diffusion.generate import Generator, Sampling
from diffusion.heldout import labels_of
from diffusion.provenance import save_png
from diffusion.report import write_report
from diffusion.train_decoder import DECODER_PRESETS, train_decoder
from diffusion.train_prior import PRIOR_PRESETS, train_prior
from diffusion.trained import load_prior, settings
from retrieval.index import build_index
from retrieval.search import Searcher

SPLITS = {
    "train": "what training saw",
    "recombined": "words that training saw, joined as it never did",
    "unseen": "concepts that training never saw",
}
# Shares of --minutes that the three trainings get; the rest is for everything between them.
SHARES = {"clip": 0.20, "prior": 0.06, "decoder": 0.54}
ROUND_TRIPS = {"train": 96, "recombined": 48, "unseen": 48}  # pictures generated for each way
# What 1,600 drawings want otherwise than the preset's larger sets: few steps, so a shorter average of the weights.
CLIP_SETTINGS = ("ema=0.97", "text_width=512", "text_heads=8", "smoothing=0")
SAMPLING = Sampling(steps=12, precision="auto")


def run_quickstart(
    out: Path | str,
    *,
    minutes: float = 8.5,
    image_size: int = 32,
    seed: int = 0,
    device: str = "auto",
    bars: Callable[[str], Progress] = lambda title: None,
    say: Callable[[str], None] = lambda text: None,
    on_warning: Callable[[str], None] | None = None,
) -> Path:
    """Run or resume every stage in folder `out`; returns the path of report.html. bars makes a progress bar by name;
    on_warning gets what the trainings find wrong, such as a checkpoint that is damaged.
    """
    out, place = Path(out), ranks.pick_device(device)
    asked = {"minutes": minutes, "seed": seed, "image_size": image_size}
    if finished(out, asked):
        say(f"{out}/ is done already; every stage is as the report found it")
        return out / "report.html"
    stages = Stages(out, say)
    data, clip, prior, decoder = (out / name for name in ("data", "clip", "prior", "decoder"))
    emb, index = {s: out / "emb" / s for s in SPLITS}, {s: out / "index" / s for s in ("train", "unseen")}
    report: dict[str, Any] = asked | {"machine": machine(place)}

    with stages("shard", "real pictures with their names"):
        report["data"] = write_demo(data, bars("shard")).result

    with stages("train clip", "pictures and captions into one space"):
        pairs = [f"minutes={minutes * SHARES['clip']}", "steps=0", f"seed={seed}", *CLIP_SETTINGS]
        config, fit_config = presets.preset("tiny", pairs)
        made = train.train_clip(
            data / "train", clip, config, fit_config, device=str(place), on_progress=bars("train clip"),
            on_warning=on_warning,
        )  # fmt: skip
        report["clip"] = {"training": made.result}

    with stages("embed", "every picture and caption as a row of 512 numbers"):
        for split, folder in emb.items():
            embed(data / split, clip, folder, device=place, on_progress=bars(f"embed {split}"))

    with stages("index", "FAISS, with its measured recall"):
        report["index"] = {s: build_index(emb[s], index[s], on_progress=bars(f"index {s}")).result for s in index}

    with stages("search", "captions find pictures"):
        report["clip"] |= retrieval_figures(emb)
        sheets = {f"queries_{s}": search_sheet(index[s], emb[s], clip, seed) for s in index}

    with stages("train prior", "caption -> what its picture would be in the space"):
        pairs = [f"minutes={minutes * SHARES['prior']}", "steps=0", f"seed={seed}"]
        config, fit_config = settings(PRIOR_PRESETS, "tiny", pairs)
        made = train_prior(
            emb["train"], prior, config=config, fit_config=fit_config, device=place, on_progress=bars("train prior"),
            on_warning=on_warning,
        )  # fmt: skip
        report["prior"] = {"training": made.result} | prior_figures(prior, emb)

    with stages("train decoder", "a point of the space -> a picture"):
        pairs = [f"minutes={minutes * SHARES['decoder']}", "steps=0", f"seed={seed}", f"image_size={image_size}"]
        config, fit_config = settings(DECODER_PRESETS, "tiny", pairs)
        made = train_decoder(
            data / "train", clip, decoder, config=config, fit_config=fit_config, device=place,
            on_progress=bars("train decoder"), on_warning=on_warning,
        )  # fmt: skip
        report["decoder"] = {"training": made.result}

    with stages("generate", "new pictures, and whether CLIP recognises them"):
        generator = Generator.open(decoder, prior, clip, device=place)
        report["loop"] = {}
        for split in SPLITS:
            report["loop"][split], sheets[f"generated_{split}"] = loop_figures(
                generator, emb[split], split, seed, out / "pictures" / split, bars(f"generate {split}")
            )

    report["stages"] = stages.figures
    report["total_seconds"] = sum(stage["seconds"] for stage in stages.figures.values())
    (out / "sheets").mkdir(exist_ok=True)
    for name, sheet in sheets.items():
        save_sheet(sheet, out / "sheets" / f"{name}.png")
    logs = {name: read_log(folder) for name, folder in {"clip": clip, "prior": prior, "decoder": decoder}.items()}
    page = write_report(out / "report.html", report, logs, sheets, (data / "ATTRIBUTION.txt").read_text())
    report["fingerprints"] = {str(f.relative_to(out)): read_manifest(f).fingerprint for f in folders(out)}
    write_file(out / "report.json", json.dumps(report, indent=1).encode())  # last: it says that all is done
    return page


def folders(out: Path) -> list[Path]:
    """Every folder with a manifest that a run makes."""
    return sorted(path.parent for pattern in ("*", "*/*") for path in out.glob(f"{pattern}/manifest.json"))


def finished(out: Path, asked: dict[str, Any]) -> bool:
    """Whether an earlier run with the same settings wrote its report, and its folders are still those it reports on."""
    try:
        report = json.loads((out / "report.json").read_text())
        made = report["fingerprints"]
        same = all(report[name] == value for name, value in asked.items())
        return same and all(read_manifest(out / name).fingerprint == value for name, value in made.items())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, UserError):
        return False


class Stages:
    """Times the stages and notes their peak memory; a stage that an earlier run finished keeps that run's figures."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {out}/: {error.strerror}") from error
        self.path, self.say = out / "stages.json", say
        self.figures: dict[str, dict[str, float]] = {}
        self.before = _times(self.path)
        self.number = 0

    @contextmanager
    def __call__(self, name: str, about: str) -> Iterator[None]:
        self.number += 1
        self.say(f"[{self.number}/8] {name}: {about}")
        reset_peak_memory()
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            earlier = self.before.get(name, {"seconds": 0.0, "peak_mb": 0.0, "whole": False})
            whole = earlier.get("whole", False)
            seconds = earlier["seconds"] if whole else earlier["seconds"] + spent
            peak = max(earlier["peak_mb"], peak_memory_mb())
            self.figures[name] = {"seconds": round(seconds, 1), "peak_mb": round(peak)}
            self.before[name] = self.figures[name] | {"whole": whole}
            write_file(self.path, json.dumps(self.before, indent=1).encode())
        self.before[name]["whole"] = True
        write_file(self.path, json.dumps(self.before, indent=1).encode())


def _times(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run noted of its stages; UserError if that is damaged."""
    if not path.exists():
        return {}
    try:
        stages = json.loads(path.read_text())
        for noted in stages.values():
            float(noted["seconds"]), float(noted["peak_mb"]), bool(noted["whole"])
        return stages
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; remove it to go on (only what stages took is lost)") from error


def reset_peak_memory() -> None:
    """Start measuring the peak anew, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory_mb() -> float:
    """Peak resident memory in MB since reset_peak_memory, or since the start where that is not possible."""
    try:
        status = Path("/proc/self/status").read_text()
        return float(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1024**2 if platform.system() == "Darwin" else peak / 1024


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def retrieval_figures(emb: dict[str, Path]) -> dict[str, Any]:
    """Recall of both directions and the modality gap, per split, each split among its own pictures."""
    out = {}
    for split, folder in emb.items():
        store = EmbeddingStore.open(folder)
        groups = labels_of(store)
        text, image = store.text(), store.image()
        out[split] = {
            "text_to_image": metrics.retrieval_recall(text, image, groups, groups).to_json(),
            "image_to_text": metrics.retrieval_recall(image, text, groups, groups).to_json(),
            "modality_gap": metrics.modality_gap(image, text),
        }
    return out


def search_sheet(index: Path, emb: Path, clip: Path, seed: int) -> Any:
    """Ten captions of the split and their eight best pictures, right ones framed."""
    store, searcher = EmbeddingStore.open(emb), Searcher.open(index, clip)
    table = store.metadata
    rows = np.random.default_rng(seed).choice(len(store), min(10, len(store)), replace=False)
    captions, labels = table["caption"].iloc[rows].tolist(), table["label"].iloc[rows].tolist()
    hits = searcher.text(captions, 8)
    return query_sheet(
        captions,
        [[searcher.picture_of(hit.row) for hit in row] for row in hits],
        [[f"{hit.score:.2f} {hit.caption}" for hit in row] for row in hits],
        [[hit.meta.get("label") == label for hit in row] for row, label in zip(hits, labels, strict=True)],
    )


def prior_figures(prior: Path, emb: dict[str, Path]) -> dict[str, Any]:
    """Per split: how near the prior and simpler guesses come to the true image embedding of each first caption."""
    model, _ = load_prior(prior)
    out = {}
    for split, folder in emb.items():
        store = EmbeddingStore.open(folder)
        out[split] = evaluate_prior(model, torch.from_numpy(store.text()), torch.from_numpy(store.image()))
    return out


def loop_figures(
    generator: Generator, emb: Path, split: str, seed: int, folder: Path, on_progress: Progress | None
) -> tuple[dict[str, Any], Any]:
    """The round trip on some rows of a split; keeps the pictures made from captions, and a sheet of all ways."""
    store = EmbeddingStore.open(emb)
    picked = np.random.default_rng(seed).choice(len(store), min(ROUND_TRIPS[split], len(store)), replace=False)
    table = store.metadata
    captions = table["caption"].iloc[picked].tolist()
    figures, made = evaluate_loop(
        generator, generator.clip, captions, picked, store.image(), labels=labels_of(store), how=SAMPLING,
        on_progress=on_progress,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(made["prior"]):
        save_png(one.picture, folder / f"{i:05d}.png", one.provenance)
    return figures, ways_sheet(made, captions, emb, store, picked)


def ways_sheet(made: dict[str, list], captions: list[str], emb: Path, store: EmbeddingStore, picked: np.ndarray) -> Any:
    """Rows of: the true picture, then what each way made of it."""
    from clip_train.pictures import decode_picture
    from clip_train.shards import ShardSet

    shards = ShardSet(store.manifest.input_path("shards"))
    place = {key: i for i, key in enumerate(shards.keys)}
    names = {
        "true": "from its own embedding",
        "prior": "from its caption, by the prior",
        "text": "from its text embedding",
    }
    pictures, labels = [], []
    for i, row in enumerate(picked[:24]):
        pictures.append(decode_picture(shards.read(place[store.keys[row]]).image))
        labels.append(captions[i])
        for way, one in made.items():
            pictures.append(one[i].picture)
            labels.append(names[way] if i < 2 else "")
    return contact_sheet(pictures, labels, columns=8)


def read_log(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl of a training."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
