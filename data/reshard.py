"""Curated shards: the samples that a selection keeps, with their own bytes, and the captions that it keeps."""

import json
from collections.abc import Collection
from typing import Any

from mmfoundry.data.sample import RawSample, read_text


def rewritten(raw: RawSample, uid: str, kept: Collection[int | None] | None) -> dict[str, Any]:
    """The members that change: JSON with the uid, and captions where some were cut.

    Args:
        raw: the sample.
        uid: what its JSON is to say.
        kept: numbers of the captions that stay; None: all.
    Raises:
        UnreadableSample: its text cannot be read.
    """
    captions, _, _ = read_text(raw)
    meta = json.loads(raw.members.get("json", b"{}"))
    numbers = range(len(captions)) if kept is None else set(kept)
    left = [caption for i, caption in enumerate(captions) if i in numbers]
    changed: dict[str, Any] = {}
    if len(left) < len(captions):
        if "captions" in meta or "txt" not in raw.members:  # which come before `caption`
            meta["captions"] = left
        if "txt" in raw.members:
            lines = [line.strip() for line in raw.members["txt"].decode("utf-8", "replace").splitlines()]
            changed["txt"] = "\n".join([line for line in lines if line in left] or left[:1]).encode("utf-8", "replace")
        changed["json"] = encoded(meta)
    if meta.get("uid") != uid:
        changed["json"] = encoded(meta | {"uid": uid})
    return changed


def encoded(meta: dict[str, Any]) -> bytes:
    """JSON as `write_shards` makes it; half a surrogate pair, which UTF-8 cannot say, stays an escape."""
    try:
        return json.dumps(meta, sort_keys=True, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(meta, sort_keys=True).encode("ascii")
