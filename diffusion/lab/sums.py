"""Text arithmetic and picture arithmetic of `lab space`: sums shown as ranked bars, and the score of every sum."""

from collections.abc import Sequence

import numpy as np
import torch

from clip_train import arithmetic
from clip_train.embed import encode_texts
from clip_train.model import Clip
from clip_train.settings import UserError
from diffusion.lab import analogies, analogy_figures
from diffusion.lab.analogies import Analogy
from diffusion.lab.bench import Bench
from diffusion.lab.chance import permutations


def arithmetic_sums(bench: Bench, batch: np.ndarray) -> None:
    """A few sums in full, with their margins and p-values, then the score of all that the names hold."""
    config, pairs = bench.config, bench.pairs
    said = ("\n".join((name, *some)) for name, some in zip(pairs.names, pairs.said, strict=True))
    words = list(dict.fromkeys(config.words or arithmetic.words_of(said, config.most_words)))
    known = analogies.derive(pairs.names, words)
    shown = [Analogy.asked(text) for text in config.expressions] or analogies.different(known, config.sums)
    if not shown or (len(words) < 8 and not config.expressions):
        return
    word_rows = encode_texts(bench.clip, words)
    options = {"permutations": config.permutations, "seed": config.seed, "top": len(words)}
    texts, pictures = [], []
    for one in shown:
        rows = encode_texts(bench.clip, [term.text for term in one.terms])
        try:
            texts.append((one, arithmetic.answer(one.expression, one.terms, rows, words, word_rows, **options)))
            found = analogies.ranked_pictures(pairs, one, words, word_rows, **options)
        except UserError:  # its terms cancel out in this CLIP
            if config.expressions:
                raise
            continue
        pictures += [] if found is None else [(one, *found)]
    if texts:
        bench.show("text_sums.png", "Captions added and taken away, and the words nearest to what is left; p: how "
                   "often random words have as large a margin.",
                   lambda path: analogy_figures.draw_texts(path, texts))  # fmt: skip
    if pictures:
        bench.show("picture_sums.png", "The same with pictures: no caption is used but for the words that are ranked.",
                   lambda path: analogy_figures.draw_pictures(path, pairs, pictures))  # fmt: skip
    bench.tables["text_sums"] = [analogies.row_of(one, found) for one, found in texts]
    bench.tables["picture_sums"] = [analogies.row_of(one, found) for one, found, _ in pictures]
    _all_sums(bench, known, words, word_rows)


def _all_sums(bench: Bench, known: Sequence[Analogy], words: Sequence[str], word_rows: np.ndarray) -> None:
    """Every sum that the names hold, so that none is picked for its answer."""
    pairs, config = bench.pairs, bench.config
    shown = [(one, pictures) for one in known if (pictures := analogies.pictures_of(pairs.names, one.terms))]
    if len(shown) < analogies.FEW:
        return
    known = [one for one, _ in shown]
    place = {word.lower(): i for i, word in enumerate(words)}
    right = np.array([place[one.rest] for one in known])
    shuffled = right[permutations(config.permutations, len(known), bench.rng(1))]
    texts = encode_texts(bench.clip, [term.text for one in known for term in one.terms])
    rows = {
        "texts": texts.reshape(len(known), 2, -1),
        "pictures": np.stack([analogies.mean_rows(pairs.image, pictures) for _, pictures in shown]),
    }
    before = encode_texts(_untrained(bench.clip, config.seed), [*words, *(t.text for one in known for t in one.terms)])
    scores, table = {}, [{"sum": one.expression, "word": one.rest} for one in known]
    for kind, both in rows.items():
        nearest, rank = analogies.nearest_words(known, both, words, word_rows, subtract=True)
        alone, _ = analogies.nearest_words(known, both, words, word_rows, subtract=False)
        share, null = float((rank == 1).mean()), (nearest == shuffled).mean(axis=1)
        bench.above(f"{kind}_sums", f"of {len(known)} sums of {kind}, so many point at the missing word first of "
                    f"{len(words)}", share, null, "%")  # fmt: skip
        scores[kind] = {"A − B": share, "A alone": float((alone == right).mean())}
        for line, place_of in zip(table, rank.tolist(), strict=True):
            line[f"rank_by_{kind}"] = place_of
        if kind == "texts":
            both = before[len(words) :].reshape(len(known), 2, -1)
            _, guessed = analogies.nearest_words(known, both, words, before[: len(words)], subtract=True)
            scores[kind]["not trained"] = float((guessed == 1).mean())
            gains = (rank == 1).astype(float) - (guessed == 1)
            signs = bench.rng(3).choice([-1, 1], (config.permutations, len(gains)))
            bench.above("texts_sums_learned", "sums of texts that point at their word first, more than in the same "
                        "network before training (words that share letters are near each other there already)",
                        float(gains.mean()), (signs * gains).mean(axis=1), "%")  # fmt: skip
    by_chance = float(null.mean())
    bench.tables["all_sums"] = table
    bench.tables["sums_scores"] = [{"terms": kind} | dict(found) for kind, found in scores.items()]
    bench.show("all_sums.png", "All sums that the pictures' names hold, not only those shown: how often the missing "
               "word comes first, how often it does when nothing is taken away, and how often before any training.",
               lambda path: analogy_figures.draw_scores(path, scores, by_chance, len(known)))  # fmt: skip


def _untrained(clip: Clip, seed: int) -> Clip:
    """The same network with the weights that a training would begin with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Clip(clip.model_cfg, clip.preprocess_cfg)
    made.folder = clip.folder  # of its tokenizer
    return made.to(clip.mean.device).eval().requires_grad_(False)
