"""Run: a person's trained folders, found by their manifests: CLIP, prior, decoder and pictures that belong together."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clip_train.folder import Manifest, read_manifest
from clip_train.settings import UserError
from clip_train.shards import list_shards

DEPTH = 3  # folders below the one given
KINDS = ("decoder", "prior", "embeddings")  # of folders that name the CLIP they belong to


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was found. Everything belongs to one CLIP; what is not there is None."""

    folder: Path
    clip: str  # a folder, or MODEL:TAG of open_clip's list
    decoder: Path | None
    prior: Path | None
    embeddings: Path | None
    shards: str | None  # of the embeddings' pictures; without embeddings those that the CLIP was trained on
    pictures: str  # their folder, for people
    seen: bool | None  # whether CLIP or decoder were trained on some of the pictures; None: nobody can tell any more

    @classmethod
    def find(cls, folder: Path | str, embeddings: Path | str | None = None) -> "Run":
        """The newest decoder with its CLIP (without one: that of the newest prior or embeddings, or the newest CLIP),
        the newest prior of that CLIP, and the largest embeddings folder whose pictures were not trained on, if there is
        one. embeddings: taken instead. What lies
        deeper in the folder is taken only where nothing lies nearer.

        UserError: no such folder, or no CLIP in it.
        """
        folder = Path(folder)
        found = sorted(manifests(folder), key=lambda made: made.created, reverse=True)
        found.sort(key=lambda made: len(made.folder.parts))
        users = sorted((made for made in found if made.kind in KINDS and "clip" in made.inputs), key=_last_wanted)
        user = next((made for made in users if _clip_of(made, found)), None)
        trained = next((made for made in found if made.kind == "clip"), None)
        if user is None and trained is None:
            raise UserError(f"{folder}/ holds no CLIP folder; give the folder that holds yours with --run, or none")
        clip = _clip_of(user, found) if user else str(trained.folder)
        known = _fingerprint(user, "clip") if user else trained.fingerprint
        own = [made for made in users if _fingerprint(made, "clip") == known]
        decoder, prior = (next((made for made in own if made.kind == kind), None) for kind in ("decoder", "prior"))
        makers = [decoder, *(made for made in found if made.kind == "clip" and made.fingerprint == known)]
        stores = [made for made in own if made.kind == "embeddings" and _tars(made)]
        stores.sort(key=lambda made: (_seen(made, makers) is False, made.result.get("rows", 0)))
        if embeddings is not None:
            stores = [read_manifest(embeddings, "embeddings")]
        store = stores[-1] if stores else None
        shards = next((_shards(made) for made in (store, *makers) if made), "")
        return cls(
            folder=folder,
            clip=clip,
            decoder=decoder.folder if decoder else None,
            prior=prior.folder if prior else None,
            embeddings=store.folder if store else None,
            shards=shards or None,
            pictures=next((str(made.input_path("shards")) for made in (store, *makers) if made), ""),
            seen=True if store is None else _seen(store, makers),
        )


def manifests(folder: Path) -> Iterator[Manifest]:
    """Of the finished folders in `folder` and up to DEPTH below; unfinished and replaced ones are left out."""
    if not folder.is_dir():
        raise UserError(f"{folder}/ does not exist")
    for depth in range(DEPTH + 1):
        for path in sorted(folder.glob("*/" * depth + "manifest.json")):
            names = path.parent.relative_to(folder).parts
            if not any(name.endswith(".partial") or ".replaced-" in name for name in names):
                try:
                    yield read_manifest(path.parent)
                except UserError:  # another tool's manifest.json
                    continue


def _fingerprint(made: Manifest, name: str) -> str | None:
    return made.inputs.get(name, {}).get("fingerprint")


def _last_wanted(made: Manifest) -> tuple[bool, bool]:
    """Decoders first, those last that were distilled to few steps: they know no other noise levels."""
    return made.kind != "decoder", "teacher" in made.inputs


def _seen(store: Manifest, makers: list[Manifest | None]) -> bool | None:
    """Whether what was trained has seen some of the store's pictures; None where what it has seen is gone."""
    trained = [made for made in makers if made and "shards" in made.inputs]
    if any(_fingerprint(made, "shards") == _fingerprint(store, "shards") for made in trained):
        return True
    if any(not _tars(store).isdisjoint(_tars(made)) for made in trained):
        return True
    return False if trained and all(_tars(made) for made in trained) else None


def _shards(made: Manifest) -> str:
    """What it was made from, if that is still there; embeddings name the tars in their input's folder."""
    where, names = made.input_path("shards"), made.result.get("shards")
    if where and made.kind == "embeddings" and names:
        return "::".join(str(where / name) for name in names)
    return str(where or "")


def _tars(made: Manifest) -> set[Path]:
    """The tars of it that are still there."""
    try:
        return {Path(tar).resolve() for tar in list_shards(_shards(made))} if _shards(made) else set()
    except UserError:
        return set()


def _clip_of(made: Manifest, found: list[Manifest]) -> str | None:
    """Where the CLIP is that it was made with: among those found, where it was then, or a name of open_clip's list."""
    wanted = _fingerprint(made, "clip")
    inside = next((one.folder for one in found if one.kind == "clip" and one.fingerprint == wanted), None)
    recorded = made.inputs["clip"].get("path", "")
    return str(inside or made.input_path("clip") or (recorded if ":" in recorded else "")) or None
