"""What a CLIP is worth on shards kept from its training."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clip_train import arithmetic, calibration, metrics, ranks, zeroshot
from clip_train.embed import encode_rows, encode_texts
from clip_train.model import Clip
from clip_train.pictures import Pictures
from clip_train.probe import linear_probe
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet

CAPTIONS = ("first", "all", "lines", "none")


@dataclass(frozen=True)
class Rows:
    """A set of shards through a CLIP, without pictures that cannot be decoded: what every evaluation starts from."""

    image: np.ndarray  # (N, D) float32 unit rows
    text: np.ndarray  # (M, D) float32 unit rows of the captions
    owner: np.ndarray  # (M,) the picture of each caption
    captions: list[str]  # M of them
    labels: list[str | None]  # N of them
    groups: np.ndarray  # (N,) equal for pictures that are right answers for each other
    bad: list[tuple[str, str]]  # (key, reason) of pictures that cannot be decoded


def embed_shards(
    shards: str | Path,
    clip: Clip,
    *,
    captions: str = "first",
    label_field: str = "label",
    pairs_only: bool = False,
    batch_size: int = 256,
    on_progress: Progress | None = None,
) -> Rows:
    """Every sample of the shards exactly once, in their order, whatever the batch size.

    captions: "first" of each sample, "all" it has (KEY.txt, and "caption" and "captions" of its json), "lines": the
    lines of its first one (CLIP_benchmark's KEY.txt holds one caption a line), "none": pictures and labels only.
    Right answers for each other are pictures of one label (json field `label_field`, or "cls": KEY.cls), and without
    label those of one first caption; with pairs_only, each picture alone.
    """
    if captions not in CAPTIONS:
        raise UserError(f"--captions {captions} must be one of: {', '.join(CAPTIONS)}")
    samples = ShardSet(shards, captions=captions != "none")
    pictures = Pictures(samples, clip.image_size)
    image, rows = encode_rows(clip, pictures, batch_size=batch_size, on_progress=on_progress)
    said = [_said(samples.captions(row), captions) if captions != "none" else [] for row in rows.tolist()]
    owner = np.repeat(np.arange(len(rows)), [len(some) for some in said])
    texts = [caption for some in said for caption in some]
    labels = [samples.label(row, label_field) for row in rows.tolist()]
    first = [some[0] if some else samples.keys[row] for some, row in zip(said, rows.tolist(), strict=True)]
    groups = np.arange(len(rows)) if pairs_only else groups_of(labels, first)
    text = encode_texts(clip, texts, batch_size=batch_size) if texts else image[:0]
    return Rows(image, text, owner, texts, labels, groups, pictures.bad)


def evaluate_clip(
    shards: str | Path,
    clip: str | Path,
    label_field: str = "label",
    *,
    captions: str = "first",
    pairs_only: bool = False,
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] = zeroshot.TEMPLATES,
    probe: str | Path | None = None,
    calibrate: bool = False,
    match_rate: float = 0.5,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """What the CLIP in folder `clip` does on shards kept from its training. See embed_shards() for what is right.

    Always: "samples", "bad_pictures", "captions", "labels"; with captions "text_to_image" and "image_to_text"
    (metrics.Recall and "mAP") and "modality_gap". With classes "zero_shot" (zeroshot.zero_shot and its "templates"):
    classnames, or when None the labels, if there are 2 to 1000 of them and every sample has one. With `probe`, shards
    to train a linear classifier of the labels on: "linear_probe". With `calibrate`: "calibration", and
    calibration.json and calibration.png are written into the clip folder.
    """
    model = Clip.load(clip, device)
    report = _staged(on_progress)
    take = {"label_field": label_field, "pairs_only": pairs_only, "batch_size": batch_size}
    made = embed_shards(shards, model, captions=captions, on_progress=report("pictures"), **take)
    figures: dict[str, Any] = {
        "samples": len(made.image),
        "bad_pictures": len(made.bad),
        "captions": len(made.captions),
        "labels": len({label.lower() for label in made.labels if label}),
    }
    if made.captions:
        figures |= retrieval(made)
    names = classes_of(made.labels, classnames, label_field)
    if names:
        rows = encode_texts(model, zeroshot.prompts(names, templates), batch_size=batch_size)
        target = zeroshot.targets(made.labels, names)
        known = target >= 0
        found = zeroshot.zero_shot(made.image[known], zeroshot.class_rows(rows, len(names)), target[known], names)
        figures["zero_shot"] = {**found, "without_class": int((~known).sum()), "templates": list(templates)}
    if probe is not None:
        train = embed_shards(probe, model, captions="none", on_progress=report("probe pictures"), **take)
        figures["linear_probe"] = _probe(train, made, label_field, device, on_progress)
    if calibrate:
        if not made.captions:
            raise UserError(f"--calibrate needs captions, and --captions {captions} leaves them out")
        figures["calibration"] = _calibrate(made, model.fingerprint, Path(clip), match_rate)
    return figures


def retrieval(made: Rows) -> dict[str, Any]:
    """Both directions: captions find pictures, pictures find captions, each with all of its group as right answers."""
    of_text = made.groups[made.owner]
    cheap = len(made.image) * len(made.text) <= 4e8
    both = {
        "text_to_image": (made.text, made.image, of_text, made.groups),
        "image_to_text": (made.image, made.text, made.groups, of_text),
    }
    figures: dict[str, Any] = {}
    for name, sides in both.items():
        figures[name] = metrics.retrieval_recall(*sides).to_json()
        if cheap:
            figures[name]["mAP"] = metrics.mean_average_precision(*sides)
    return figures | {"modality_gap": metrics.modality_gap(made.image, made.text)}


def tables(figures: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple]]]:
    """What evaluate_clip returns as (title, column names, rows) to be shown to a person."""
    out = []
    counts = f"{figures['samples']} pictures, {figures['captions']} captions, {figures['labels']} labels"
    if "text_to_image" in figures:
        rows = []
        for name in ("text_to_image", "image_to_text"):
            found = figures[name]
            shares = [f"{share:.3f}" for share in found["recall"].values()]
            rows.append(
                (name.replace("_", " "), *shares, f"{found['chance']['R@10']:.3f}", f"{found['median_rank']:g}")
            )
            rows[-1] += (f"{found['mAP']:.3f}" if "mAP" in found else "-",)
        head = ("retrieval", "R@1", "R@5", "R@10", "chance R@10", "median rank", "mAP")
        out.append((f"{counts}; modality gap {figures['modality_gap']:.2f}", head, rows))
    accuracy = []
    for name in ("zero_shot", "linear_probe"):
        if name in figures:
            found = figures[name]
            shares = [f"{found[key]:.3f}" for key in ("acc1", "acc5", "mean_per_class_recall")]
            luck = found["chance"] if name == "zero_shot" else found["majority"]
            accuracy.append((name.replace("_", "-"), *shares, f"{luck:.3f}", found["classes"], found["samples"]))
    if accuracy:
        head = ("classification", "acc1", "acc5", "mean per class", "guessing", "classes", "pictures")
        out.append(("" if "text_to_image" in figures else counts, head, accuracy))
    if "zero_shot" in figures and figures["zero_shot"]["worst"]:
        rows = []
        for one in figures["zero_shot"]["worst"]:
            taken = ", ".join(f"{name} {share:.2f}" for name, share in one["confused_with"].items())
            rows.append((one["class"], f"{one['recall']:.2f}", one["pictures"], taken))
        out.append(("", ("worst classes", "recall", "pictures", "taken for"), rows))
    if "calibration" in figures:
        found = figures["calibration"]
        even = "none" if found["cosine_of_even_odds"] is None else f"{found['cosine_of_even_odds']:.3f}"
        rows = [
            (name, f"{found[key]:.4f}", f"{found[key + '_base_rate']:.4f}" if key + "_base_rate" in found else "")
            for name, key in (("calibration error", "ece"), ("Brier score", "brier"), ("log loss", "log_loss"))
        ]
        title = f"match rate {found['match_rate']:g}, even odds at cosine {even}; written to {found['file']}"
        out.append((title, ("calibration (held-out pairs)", "curve", "base rate alone"), rows))
    return out


def arithmetic_tables(answers: Sequence[dict[str, Any]]) -> list[tuple[str, tuple[str, ...], list[tuple]]]:
    """What arithmetic_answers returns as (title, column names, rows) to be shown to a person."""
    out = []
    for one in answers:
        title = (
            f"{one['expression']}: margin {one['margin']:.3f} (p {one['p_margin']:.3f} against sums of random words, "
            f"p of the cosine {one['p_cosine']:.3f}), {one['words']} words"
        )
        rows = [(n, f"{a['cosine']:.3f}", a["word"]) for n, a in enumerate(one["answers"], 1)]
        out.append((title, ("rank", "cosine", "word"), rows))
    return out


def arithmetic_answers(
    expressions: Sequence[str],
    clip: str | Path,
    *,
    words: Sequence[str] | None = None,
    shards: str | Path | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> list[dict[str, Any]]:
    """arithmetic.answer() of each expression, against `words` or the commonest words of the shards' captions."""
    terms = [arithmetic.parse(expression) for expression in expressions]
    if words is None:
        if shards is None:
            raise UserError("--arithmetic ranks words; say which: --words FILE, or --shards for those of its captions")
        samples = ShardSet(shards)
        words = arithmetic.words_of(c for row in range(len(samples)) for c in samples.captions(row))
    words = list(dict.fromkeys(words))
    model = Clip.load(clip, device)
    word_rows = encode_texts(model, words, batch_size=batch_size)
    return [
        arithmetic.answer(expression, some, encode_texts(model, [term.text for term in some]), words, word_rows)
        for expression, some in zip(expressions, terms, strict=True)
    ]


def _said(captions: list[str], which: str) -> list[str]:
    if which == "lines":
        return [line.strip() for line in captions[0].splitlines() if line.strip()]
    return captions if which == "all" else captions[:1]


def _staged(on_progress: Progress | None) -> Callable[[str], Progress | None]:
    """on_progress with the name of the part that is going on."""
    return lambda stage: on_progress and partial(on_progress, stage=stage)


def _probe(
    train: Rows, test: Rows, label_field: str, device: str | torch.device, on_progress: Progress | None
) -> dict[str, Any]:
    names = sorted({label.lower() for label in train.labels if label})
    if len(names) < 2:
        raise UserError(
            f"--probe needs training shards with at least two values of {label_field!r}, these have {len(names)}; "
            "name another field: --label-field"
        )
    train_target, target = (zeroshot.targets(rows.labels, names) for rows in (train, test))
    labelled, known = train_target >= 0, target >= 0
    if not known.any():
        raise no_class_named(label_field, test.labels, names)
    found = linear_probe(
        train.image[labelled],
        train_target[labelled],
        test.image[known],
        target[known],
        device=device,
        on_progress=on_progress,
    )
    return {**found, "without_class": int((~known).sum())}


def _calibrate(made: Rows, fingerprint: str, folder: Path, match_rate: float) -> dict[str, Any]:
    pairs = calibration.draw_pairs(made.image, made.text, made.owner, made.groups)
    curve, held_out = calibration.calibrate(pairs, fingerprint, match_rate)
    path = calibration.save(folder, curve)
    calibration.plot(folder / calibration.PLOT, pairs, held_out, curve)
    return {
        "file": str(path),
        "match_rate": match_rate,
        "slope": curve.slope,
        "offset": curve.offset,
        **curve.measured,
    }


class Validation:
    """Retrieval and zero-shot on kept samples, again and again while a model trains.

    Pictures are decoded and captions tokenised once, here; a call costs the forward passes of `samples` pictures, of
    their distinct first captions and of the class prompts. Under torchrun the ranks share the work and all get the
    same numbers; each calls the model equally often, as FSDP and DDP need.
    """

    def __init__(
        self,
        shards: str | Path | ShardSet,
        clip: Clip,
        *,
        label_field: str = "label",
        classnames: Sequence[str] | None = None,
        templates: Sequence[str] = zeroshot.TEMPLATES,
        max_samples: int = 5000,
        batch_size: int = 256,
        on_progress: Progress | None = None,
    ) -> None:
        """clip: gives the picture size and the tokenizer; its weights are not used.

        classnames: what the zero-shot numbers are about; None: the samples' labels, if all samples have one and there
        are 2 to 1000 of them; (): no zero-shot. max_samples: of a larger set, this many, evenly spaced.
        UserError: unusable shards, or classnames that no sample's label names.
        """
        shards = shards if isinstance(shards, ShardSet) else ShardSet(shards)
        wanted = np.unique(np.linspace(0, len(shards) - 1, min(max_samples, len(shards))).astype(np.int64))
        pixels, rows = _decoded(shards, clip.image_size, wanted, batch_size, on_progress)
        self.batch_size = batch_size
        self.samples = len(rows)
        captions = [shards.captions(row)[0] for row in rows]
        labels = [shards.label(row, label_field) for row in rows]
        self.groups = groups_of(labels, captions)
        names = classes_of(labels, classnames, label_field)
        self.target = zeroshot.targets(labels, names) if names else None
        self.classes = len(names)
        said = zeroshot.prompts(names, templates) if names else []
        texts = sorted({*captions, *said}, key=lambda text: (len(text), text))
        place = {text: i for i, text in enumerate(texts)}
        self._caption = np.array([place[text] for text in captions])
        self._prompt = np.array([place[text] for text in said], dtype=np.int64)
        self._texts = len(texts)
        self._pixels = pixels[_own(len(rows))]
        self._tokens = clip.tokenize(texts)[_own(len(texts))]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """model(pixels, tokens) -> (image rows, text rows, ...), in eval mode: a Clip, or one wrapped for ranks.

        Returns shares: "t2i_R@1", "t2i_R@10", "i2t_R@1", "i2t_R@10" (all samples of a label are right), and with
        classes "zero_shot_acc1" and "zero_shot_acc5".
        """
        device = next(model.parameters()).device
        image, text = [], []
        for pixels, tokens in itertools.zip_longest(
            self._pixels.split(self.batch_size), self._tokens.split(self.batch_size)
        ):
            # when one side is through, one row of it stands in: the two towers do not look at each other
            image_rows, text_rows, *_ = model(
                (self._pixels[:1] if pixels is None else pixels).to(device, non_blocking=True),
                (self._tokens[:1] if tokens is None else tokens).to(device, non_blocking=True),
            )
            image += [] if pixels is None else [image_rows.float()]
            text += [] if tokens is None else [text_rows.float()]
        images = ranks.gather_rows(torch.cat(image))[: self.samples].cpu().numpy()
        texts = ranks.gather_rows(torch.cat(text))[: self._texts].cpu().numpy()
        captions = texts[self._caption]
        numbers: dict[str, float] = {}
        for name, queries, rows in (("t2i", captions, images), ("i2t", images, captions)):
            rank = metrics.ranks(queries, rows, self.groups, self.groups)
            numbers |= {f"{name}_R@{k}": float((rank <= k).mean()) for k in (1, 10)}
        if self.target is not None:
            known = self.target >= 0
            classes = zeroshot.class_rows(texts[self._prompt], self.classes)
            rank = metrics.ranks(images[known], classes, self.target[known], np.arange(self.classes))
            numbers |= {f"zero_shot_acc{k}": float((rank <= k).mean()) for k in (1, 5)}
        return numbers


def groups_of(labels: Sequence[str | None], captions: Sequence[str]) -> np.ndarray:
    """(N,) int64: equal for samples that are right answers for each other, by label, or by caption without one."""
    names = [(label or caption).lower() for label, caption in zip(labels, captions, strict=True)]
    return np.unique(names, return_inverse=True)[1]


def classes_of(labels: Sequence[str | None], classnames: Sequence[str] | None, label_field: str) -> list[str]:
    """The classes to tell apart: classnames, or when None the labels, if every sample has one and there are 2 to 1000.

    UserError: no label names any of the classnames.
    """
    if classnames is None:
        names = sorted(set(labels)) if all(labels) else []
        return names if 2 <= len(names) <= 1000 else []
    if len(classnames) and (zeroshot.targets(labels, classnames) < 0).all():
        raise no_class_named(label_field, labels, classnames)
    return list(classnames)


def no_class_named(label_field: str, labels: Sequence[str | None], classnames: Sequence[str]) -> UserError:
    """The complaint that no sample's label is among the class names."""
    some = next((label for label in labels if label), None)
    has = f"they say, for example, {some!r}" if some else f"the samples have no {label_field!r}"
    return UserError(
        f"none of {len(labels)} samples has one of the {len(classnames)} classes ({classnames[0]!r}, ...) as its "
        f"{label_field!r}: {has}; write the classes as the labels are, or name another field: --label-field"
    )


def _decoded(
    shards: ShardSet, size: int, rows: np.ndarray, batch_size: int, on_progress: Progress | None
) -> tuple[torch.Tensor, list[int]]:
    """uint8 (N, 3, size, size) of the rows that can be decoded, and these rows."""
    pictures = Pictures(shards, size, cache_bytes=0)
    pixels, found = [], []
    for low in range(0, len(rows), batch_size):
        some, kept = pictures.load(rows[low : low + batch_size])
        pixels.append(some)
        found += kept.tolist()
        if on_progress:
            on_progress(min(low + batch_size, len(rows)), len(rows))
    return torch.cat(pixels), found


def _own(count: int) -> torch.Tensor:
    """This rank's share of `count` rows, equally many on every rank: the last ranks begin again at the first row."""
    share = -(-count // ranks.world_size())
    return torch.arange(ranks.rank() * share, (ranks.rank() + 1) * share) % count
