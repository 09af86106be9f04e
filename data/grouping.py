"""Members of a tar -> samples, as webdataset groups them, with every member and sample that is left out named."""

import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mmfoundry.data.tar import BLOCK, Damage, TarMember

MAX_LISTED_DAMAGE = 100_000  # of one shard; a hostile one could fill the memory with it
_MAX_PATH = 4096  # characters
_HOLES = (
    "damaged header",
    "cut off",
    "damaged long name",
    "end marker inside",
)  # damage that hides how many members it cost
# webdataset's rule: the extension starts at the first dot
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls, and bytes that were not UTF-8


@dataclass(slots=True)
class Grouped:
    """Samples of a shard, flat: sample i has the members `member_ends[i - 1]` to `member_ends[i] - 1`.

    Attributes:
        keys: of each sample.
        member_ends: for each sample, how many members there are up to its end.
        extensions: names of the extensions that occur, sorted.
        kinds: for each member, the number of its extension.
        blocks: for each member, the 512-byte block at which its payload starts.
        sizes: bytes of each member.
        damage: what was left out, in order of place.
        unlisted: how much more damage there is than `damage` lists.
    """

    keys: list[str] = field(default_factory=list)
    member_ends: array = field(default_factory=lambda: array("Q"))
    extensions: list[str] = field(default_factory=list)
    kinds: array = field(default_factory=lambda: array("L"))
    blocks: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("Q"))
    damage: list[Damage] = field(default_factory=list)
    unlisted: int = 0

    def members_of(self, number: int) -> range:
        """The numbers of a sample's members."""
        return range(self.member_ends[number - 1] if number else 0, self.member_ends[number])

    def kinds_of(self, number: int) -> frozenset[str]:
        """The extensions that a sample has."""
        return frozenset(self.extensions[self.kinds[member]] for member in self.members_of(number))

    def note(self, damage: Damage) -> None:
        """List damage, up to a number."""
        if len(self.damage) < MAX_LISTED_DAMAGE:
            self.damage.append(Damage(damage.offset, damage.reason, printable(damage.name)))
        else:
            self.unlisted += 1


def group(
    found: Iterable[TarMember | Damage], before: Mapping[str, frozenset[str]] | None = None, same: bool = False
) -> Grouped:
    """Group neighbours with the same path up to the first dot of its last part.

    Added to the damage that is found: "unsafe path", "no extension", "duplicate member", "duplicate key", and
    "incomplete sample": one that borders on damage and lacks a member. Which members it should have is known from
    `before`, or else from a damaged header whose name can still be read, or else from the samples away from damage:
    none of them has just this set of extensions; or, where there is no such sample, another one has more.

    Args:
        found: members and damage in order of place.
        before: extensions by key, as far as they were known when the shard was whole.
        same: the shard has the bytes that it had then, but for damage; then a sample that has fewer members now is
            incomplete wherever it is, as zeros over whole members can look like the joint of two tars.
    """
    grouped, borders, named = _collect(found)
    if same and before is not None:
        for number, key in enumerate(grouped.keys):
            if key in before and grouped.kinds_of(number) < before[key]:
                borders.add(number)
    if borders:
        _drop_incomplete(grouped, borders, named, before or {})
    if grouped.unlisted:
        grouped.damage.append(Damage(grouped.damage[-1].offset, "more damage", f"{grouped.unlisted} places more"))
    order = sorted(range(len(grouped.extensions)), key=grouped.extensions.__getitem__)
    places = {number: place for place, number in enumerate(order)}
    grouped.kinds = array("L", (places[kind] for kind in grouped.kinds))
    grouped.extensions.sort()
    return grouped


def _collect(found: Iterable[TarMember | Damage]) -> tuple[Grouped, set[int], dict[str, set[str]]]:
    """The samples; the numbers of those with damage inside or next to them; the members that damaged headers name."""
    grouped = Grouped()
    borders: set[int] = set()
    named: dict[str, set[str]] = {}
    seen: set[str] = set()
    numbers: dict[str, int] = {}
    own: set[int] = set()  # extensions of the sample at hand
    beside_damage = False
    for item in found:
        if isinstance(item, Damage):
            grouped.note(item)
            if item.reason in _HOLES:
                if grouped.keys:
                    borders.add(len(grouped.keys) - 1)
                beside_damage = True
                if isinstance(name := split_path(item.name), tuple) and len(named) < MAX_LISTED_DAMAGE:
                    named.setdefault(name[0], set()).add(name[1])
            continue
        name = split_path(item.path)
        if not isinstance(name, tuple):
            if name is not None:
                grouped.note(Damage(item.offset - BLOCK, name, item.path))
            continue
        key, extension = name
        if not grouped.keys or grouped.keys[-1] != key:
            if key in seen:
                grouped.note(Damage(item.offset - BLOCK, "duplicate key", item.path))
                continue
            seen.add(key)
            grouped.keys.append(key)
            grouped.member_ends.append(len(grouped.kinds))
            own = set()
            if beside_damage:
                borders.add(len(grouped.keys) - 1)
        beside_damage = False
        number = numbers.get(extension)
        if number is None:
            number = numbers[extension] = len(numbers)
            grouped.extensions.append(extension)
        if number in own:
            grouped.note(Damage(item.offset - BLOCK, "duplicate member", item.path))
            continue
        own.add(number)
        grouped.kinds.append(number)
        grouped.blocks.append(item.offset // BLOCK)
        grouped.sizes.append(item.size)
        grouped.member_ends[-1] += 1
    return grouped, borders, named


def _drop_incomplete(
    grouped: Grouped, borders: set[int], named: Mapping[str, set[str]], before: Mapping[str, frozenset[str]]
) -> None:
    usual = {grouped.kinds_of(number) for number in range(len(grouped.keys)) if number not in borders}
    if not usual:  # a few samples, all of them beside damage
        every = {grouped.kinds_of(number) for number in borders}
        usual = {kinds for kinds in every if not any(kinds < other for other in every)}

    def lacks_a_member(number: int) -> bool:
        key, kinds = grouped.keys[number], grouped.kinds_of(number)
        if key in before:
            return kinds != before[key]
        return kinds not in usual or not named.get(key, set()) <= kinds

    lost = {number for number in borders if lacks_a_member(number)}
    if not lost:
        return
    for number in sorted(lost):
        offset = grouped.blocks[grouped.members_of(number)[0]] * BLOCK - BLOCK
        grouped.note(Damage(offset, "incomplete sample", grouped.keys[number]))
    kept = [number for number in range(len(grouped.keys)) if number not in lost]
    members = [member for number in kept for member in grouped.members_of(number)]
    ends = array("Q")
    for number in kept:
        ends.append((ends[-1] if ends else 0) + len(grouped.members_of(number)))
    grouped.keys = [grouped.keys[number] for number in kept]
    grouped.member_ends = ends
    grouped.kinds = array("L", (grouped.kinds[member] for member in members))
    grouped.blocks = array("Q", (grouped.blocks[member] for member in members))
    grouped.sizes = array("Q", (grouped.sizes[member] for member in members))
    grouped.damage.sort(key=lambda damage: damage.offset)


def split_path(path: str) -> tuple[str, str] | str | None:
    """Key and extension of a member; or the reason why it is refused; or None: it is passed over."""
    if len(path) > _MAX_PATH:
        return "unsafe path"
    while path.startswith("./"):
        path = path[2:]
    name = path.rpartition("/")[2]
    if name.startswith("__") and name.endswith("__"):  # webdataset's own notes
        return None
    if path.startswith("/") or ".." in path.split("/") or _UNSAFE.search(path):
        return "unsafe path"
    match = _KEY.fullmatch(path)
    return (match[1], match[2].lower()) if match else "no extension"


def printable(text: str) -> str:
    """A name from a stranger as it may go to a terminal or a log: controls and broken UTF-8 as escapes."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text[:_MAX_PATH])
