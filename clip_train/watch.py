"""Watching contrastive training: a few numbers of the rows now and then, and warnings that name the likely cause."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from clip_train.model import MAX_LOGIT_SCALE

NUMBERS = ("gap", "rank_image", "rank_text", "cos_right", "cos_wrong", "top1", "pairing")  # what a look may give
TOWERS = ("image", "text")
ROWS = 256  # pairs that are looked at
IDS = 2048  # pairs whose captions and labels are compared
BEGIN = 4  # steps at the start whose rows tell whether captions belong to their pictures
AT_CHANCE = 0.99  # loss as a share of chance: above it nothing is told apart
LEARNED = 0.97  # below it something was
ONE_POINT = 2.0  # effective rank below which the rows are about one point
RELATED = 3.0  # standard deviations: captions do belong to their pictures
UNRELATED = 2.0  # below this many, nothing says that they do
UNMOVED = 0.02  # change of a tower's weights, of their own size, that is next to nothing


def effective_rank(rows: torch.Tensor) -> float:
    """How many directions rows use evenly: 1 when all are one point, at most min(N, D).

    RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 2): exp of the entropy of the singular values, which are
    taken here from the smaller of the two Gram matrices. rows: (N, D); nan where one is not finite.
    """
    rows = rows.double()
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    if not gram.isfinite().all():  # eigvalsh would raise; fit names the step
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum()
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def describe(image_rows: torch.Tensor, text_rows: torch.Tensor) -> dict[str, float]:
    """What unit rows (N, D) of pairs are like.

    gap: between the two modalities' means (Liang et al. 2022, arXiv 2203.02053), 0 to 2. rank_image, rank_text: see
    effective_rank. cos_right, cos_wrong: mean cosine of right and of all other pairs; alignment of Wang and Isola
    (2020, arXiv 2005.10242) is 2 - 2 cos_right. top1: share of pictures whose nearest caption is their own.
    """
    count = len(image_rows)
    cosines = image_rows @ text_rows.T
    right = cosines.diagonal()
    return {
        "gap": float((image_rows.mean(0) - text_rows.mean(0)).norm()),
        "rank_image": effective_rank(image_rows),
        "rank_text": effective_rank(text_rows),
        "cos_right": float(right.mean()),
        "cos_wrong": float((cosines.sum() - right.sum()) / max(1, count * (count - 1))),
        "top1": float((cosines.argmax(1) == torch.arange(count)).float().mean()),
    }


def pairing(image_rows: torch.Tensor, text_rows: torch.Tensor, shuffles: int = 32) -> float:
    """Do alike pictures have alike captions? In standard deviations above what shuffled captions give.

    A permutation test of the kernel dependence HSIC (Gretton et al. 2007), without its diagonal. Even towers that
    have learned nothing keep like things together, so this tells before training whether the pairs are right: about
    10 on 256 pairs of the emoji data, within 2 of 0 when the captions are shuffled.
    image_rows, text_rows: (N, D), row i of both is one pair.
    """
    image, text = image_rows - image_rows.mean(0), text_rows - text_rows.mean(0)
    alike_image, alike_text = [(rows @ rows.T).fill_diagonal_(0) for rows in (image, text)]
    if min(alike_image.norm(), alike_text.norm()) < 1e-6:  # all pictures or all captions are one point
        return 0.0
    rng = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(image), generator=rng) for _ in range(shuffles)]
    chance = torch.stack([(alike_image * alike_text[order][:, order]).sum() for order in orders])
    return float(((alike_image * alike_text).sum() - chance.mean()) / chance.std().clamp_min(1e-30))


def lowest_loss(scale: float, batch_size: int) -> float:
    """The lowest InfoNCE that any unit rows reach at this logit scale, in nats.

    Reached by a regular simplex, whose rows are -1 / (B - 1) apart in cosine (Graf et al. 2021, arXiv 2102.08817).
    """
    return math.log1p((batch_size - 1) * math.exp(-scale * batch_size / max(1, batch_size - 1)))


def duplicates_floor(ids: Sequence[torch.Tensor]) -> float:
    """The lowest multi-positive InfoNCE of a batch in which pairs are each other's right answers, in nats.

    The target is shared equally among the right answers, so its entropy is left: ln of their number, averaged.
    ids: (B,) each; pairs that agree in one are each other's.
    """
    same = torch.stack([i[:, None] == i[None, :] for i in ids]).any(0)  # of these alone: no rank waits for another here
    return float(same.sum(1).double().log().mean())


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is known at one look."""

    step: int
    loss: float  # median of the last calls
    chance: float
    scale: float
    numbers: dict[str, float]
    least: float  # no rows reach a lower loss at this scale, see lowest_loss
    moved: dict[str, float]  # tower -> change of its weights since the first look, of their own size
    same: float  # how many pairs of the batch share a pair's caption or label, itself among them (geometric mean)
    pairs: int  # of the batch on this rank, at most IDS

    @property
    def stuck(self) -> bool:
        """Nothing is told apart."""
        return self.loss >= AT_CHANCE * self.chance

    @property
    def all_the_same(self) -> bool:
        """Even perfect rows stay above half of the chance level."""
        return self.same > math.sqrt(self.pairs)

    @property
    def collapsed(self) -> list[str]:
        """The towers whose rows are about one point."""
        return [tower for tower in TOWERS if self.numbers[f"rank_{tower}"] < ONE_POINT]


class Watcher:
    """Called with the loss and the rows of a step, says what they are like and what is wrong with them.

    It judges nothing before the warm-up and `grace` steps are over, then says what has been wrong at `patience` looks
    in a row, each thing once. What the causes look like was found by bringing each about; tests/test_watch.py does.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        kind: str = "infonce",
        warmup: int = 0,
        lr: float = 0.0,
        clip: nn.Module | None = None,
        trained: bool = False,
        every: int = 50,
        grace: int = 200,
        patience: int = 3,
    ) -> None:
        """batch_size: pairs told apart, all ranks together. kind: "infonce" or "siglip". warmup: steps, to the peak lr.

        clip: the model in training (not wrapped), to see whether its towers move; None with FSDP, which trains a copy.
        trained: whether it was trained before. every: steps between looks; a look takes some 20 ms.
        """
        self.batch_size = batch_size
        self.kind = kind
        self.rate = f" (lr {lr:g})" if lr else ""
        self.clip = clip
        self.trained = trained
        self.every = every
        self.patience = patience
        self.settled = warmup + grace
        self._next = 0  # step of the next look
        self._recent: list[float | torch.Tensor] = []  # losses of the last calls
        self._best = (math.inf, 0)  # the lowest loss so far, as a share of chance, and its step
        self._begun = 0  # how many first steps were looked at
        self._pairing: list[float] = []  # of these, where the rows had something in them
        self._weights: dict[str, torch.Tensor] = {}  # some of each tower's, at the first look
        self._first: dict[str, float] = {}  # numbers of the first look
        self._rank = dict.fromkeys(TOWERS, 0.0)  # highest since settled
        self._held: dict[str, int] = {}  # at how many looks in a row something has been wrong
        self._said: set[str] = set()

    @torch.no_grad()
    def begin(self, image_rows: torch.Tensor, text_rows: torch.Tensor) -> None:
        """To be called with the rows of the first steps (any more are ignored), before much is learned or broken.

        Not needed, but without it a learning rate that destroys the towers at once looks like captions that do not
        belong to their pictures.
        """
        if self._begun < BEGIN:
            self._begun += 1
            self._weights = self._weights or self._sample()
            rows = _rows(image_rows, text_rows)
            if min(effective_rank(r) for r in rows) >= ONE_POINT:  # a resumed run may be broken already
                self._pairing.append(pairing(*rows))

    @torch.no_grad()
    def __call__(
        self,
        step: int,
        loss: float | torch.Tensor,
        scale: float | torch.Tensor,
        image_rows: torch.Tensor,
        text_rows: torch.Tensor,
        *,
        chance: float | torch.Tensor | None = None,
        ids: Sequence[torch.Tensor] = (),
    ) -> tuple[dict[str, float], list[str]]:
        """What the rows of `step` are like, and what the user should know; both empty between looks.

        loss: of the step, in nats. scale: the logit scale, 1 / temperature. chance: the loss of knowing nothing; None:
        ln batch_size. These may be detached tensors: between looks they are not read, so that no GPU is waited for.
        image_rows, text_rows: (b, D), unit rows of this rank. ids: (b,) each, as for same_caption.
        Returns: numbers named in NUMBERS, and warnings of one line.
        """
        self._recent = [*self._recent[-4:], loss]
        if step < self._next:
            return {}, []
        self._next = step + self.every

        chance = math.log(self.batch_size) if chance is None else float(chance)
        middle = sorted(float(loss) for loss in self._recent)[len(self._recent) // 2]
        self._best = min(self._best, (middle / chance, step))
        rows = _rows(image_rows, text_rows)
        if not all(r.isfinite().all() for r in rows):
            return {}, []  # fit() stops such a run
        ids = [i[:IDS] for i in ids]
        if not self._first:
            self.begin(*rows)
        look = Look(
            step=step,
            loss=middle,
            chance=chance,
            scale=float(scale),
            numbers=describe(*rows),
            least=lowest_loss(float(scale), self.batch_size) if self.kind == "infonce" else 0.0,
            moved=self._moved(),
            same=math.exp(duplicates_floor(ids)) if ids else 1.0,
            pairs=len(ids[0]) if ids else len(image_rows),
        )
        if not self._first:
            self._first = dict(look.numbers)
            look.numbers["pairing"] = self._strength
        return look.numbers, self._warnings(look)

    def _warnings(self, look: Look) -> list[str]:
        faults = dict(self._faults(look))
        self._held = {name: self._held.get(name, 0) + 1 for name in faults}
        ready = [name for name in faults if self._held[name] >= self.patience and name not in self._said]
        ready = [name for name in ready if look.step >= self.settled]
        self._said |= set(ready)
        return [faults[name] for name in ready]

    def _faults(self, look: Look) -> Iterator[tuple[str, str]]:
        """What is wrong at this look: its name and the line to say."""
        loss = f"loss {look.loss:.2f} (chance {look.chance:.2f})"
        if look.stuck:
            yield "stuck", f"{loss}: {self._cause(look)}"
        elif look.all_the_same:
            yield "duplicates", f"{loss} cannot fall far: {_duplicates(look)}"
        elif look.least > 0.5 * look.chance:
            yield "temperature low", f"{loss}: {_scale_hides(look)}"
        else:
            yield from self._lost_directions(look, loss)

        high = look.scale > 0.99 * MAX_LOGIT_SCALE and look.loss > 0.9 * look.chance and not look.stuck
        if high or look.scale > 1.05 * MAX_LOGIT_SCALE:
            limit = f"logit scale {look.scale:.0f} has reached its limit of {MAX_LOGIT_SCALE:.0f}"
            way_out = f"start it at 14.3 and lower the learning rate{self.rate}"
            yield "temperature high", f"{loss}: {limit} though pairs are hardly told apart; {way_out}"
        if self.batch_size < 8:
            few = f"a batch of {self.batch_size} pairs is small: there are {self.batch_size - 1} wrong answers to each"
            yield "small batch", f"{loss}: {few}; raise batch_size, and accumulate with it where memory is short"
        for tower in _still(look) if not (look.stuck and len(_still(look)) == 2) else ():
            if not self._locked(tower):
                why = "nothing locks it, but its gradients do not arrive, or its share of the learning rate is 0"
                yield f"frozen {tower}", f"the {tower} tower has not changed since training began: {why}"
            elif not self.trained:
                why = "unlock it, or start from a trained model (--init)"
                yield f"frozen {tower}", f"the {tower} tower is locked, but was never trained: {why}"

    def _lost_directions(self, look: Look, loss: str) -> Iterator[tuple[str, str]]:
        for tower in TOWERS:
            name = f"rank_{tower}"
            rank, first = look.numbers[name], self._first[name]
            if look.step >= self.settled:
                self._rank[tower] = max(rank, self._rank[tower])
            best = self._rank[tower]
            # towers that learn well may pass through a quarter of their first rank, as the text tower on the emoji does
            lost = rank < max(0.15 * first, 0.3 * best) or rank < min(3.0, 0.5 * first)
            if lost and self.batch_size > 16 and look.same < 2:
                state = f"the effective rank of the {tower} tower's rows fell from {max(best, first):.1f} to {rank:.1f}"
                yield name, f"{loss}: {state}; the learning rate{self.rate} is too high, or weight_decay is"

    def _cause(self, look: Look) -> str:
        """Why the loss is at chance: the first explanation that the evidence bears out."""
        still = _still(look)
        if len(still) == 2:
            return "neither tower changes; unlock one of them"
        if look.all_the_same:
            return _duplicates(look)
        lower = f"the learning rate{self.rate} is too high; start again with a tenth of it or a longer warm-up"
        rank = look.numbers["rank_image"], look.numbers["rank_text"]
        which = {0: "rows differ, but not as their partners do", 1: "the {} tower makes", 2: "both towers make"}
        state = which[len(look.collapsed)].format(*look.collapsed) + " one point of everything" * bool(look.collapsed)
        state += f" (effective rank of pictures {rank[0]:.1f}, of captions {rank[1]:.1f})"
        share, when = self._best
        if share < LEARNED:
            return f"{state}, after the loss had been {share:.0%} of chance at step {when}: {lower}"
        if look.moved and max(look.moved.values()) < UNMOVED:
            return f"the towers have hardly moved since training began: the learning rate{self.rate} is too low"
        if look.least > 0.9 * look.chance and not look.collapsed:
            return _scale_hides(look)
        if self._strength > RELATED:
            return f"{state}, though captions did fit their pictures when training began: {lower}"
        if still:
            return f"the {still[0]} tower does not change and its rows say too little; unlock it or start it trained"
        wrong = "captions do not belong to their pictures (shuffled, or joined by a wrong key), so look at some pairs"
        if len(self._pairing) * min(ROWS, look.pairs) >= 256 and self._strength < UNRELATED:
            return f"{state}, and had nothing in common when training began: {wrong}; if they do belong, lower lr"
        return f"{state}: either {lower}; or {wrong}"

    @property
    def _strength(self) -> float:
        """`pairing` of the first steps, taken together (Stouffer)."""
        return sum(self._pairing) / math.sqrt(max(1, len(self._pairing)))

    def _tower(self, tower: str) -> list[nn.Parameter]:
        named = self.clip.named_parameters() if self.clip else ()
        named = [(n, p) for n, p in named if not n.endswith(("logit_scale", "logit_bias"))]
        return [p for n, p in named if ("visual." in n) == (tower == "image")]

    def _locked(self, tower: str) -> bool:
        return not any(p.requires_grad for p in self._tower(tower))

    def _sample(self) -> dict[str, torch.Tensor]:
        """Sixteen values of each of a tower's weights, (M,) float32."""
        some = {}
        for tower in TOWERS if self.clip else ():
            parts = [p.to_local() if hasattr(p, "to_local") else p for p in self._tower(tower)]  # FSDP: this rank's
            parts = [p.detach().reshape(-1) for p in parts]
            some[tower] = torch.cat([p[:: max(1, len(p) // 16)][:16].float() for p in parts]).cpu()
        return some

    def _moved(self) -> dict[str, float]:
        now = self._sample()
        return {t: float((now[t] - was).norm() / was.norm().clamp_min(1e-12)) for t, was in self._weights.items()}


def _still(look: Look) -> list[str]:
    return [tower for tower, change in look.moved.items() if change == 0]


def _duplicates(look: Look) -> str:
    return (
        f"about {look.same:.0f} of the {look.pairs} pairs of a batch share each caption or label, so there is little "
        "to tell apart; give captions that differ"
    )


def _scale_hides(look: Look) -> str:
    best = f"even perfect rows reach {look.least:.2f} only"
    return f"at logit scale {look.scale:.2f} {best}; start it at 14.3 and let it learn"


def _rows(*rows: torch.Tensor) -> list[torch.Tensor]:
    """The first ROWS of each, (N, D) float32, on the CPU, where looking at them holds nothing up."""
    return [r.detach()[:ROWS].float().cpu() for r in rows]
