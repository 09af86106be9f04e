"""Shards in, batches out: index, sampler, reader, decode, transforms, text, filters and the shipped sample data.

`from mmfoundry.data import Loader` is all that one's own trainer needs; nothing is imported until it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfoundry.data.decode import DecodeLimits, UnreadableSample
    from mmfoundry.data.loader import Loader, Source
    from mmfoundry.data.pairs import PairEncoder
    from mmfoundry.data.ragged import Ragged
    from mmfoundry.data.reader import Pool
    from mmfoundry.data.sample import RawSample, Sample
    from mmfoundry.data.shards import write_shards
    from mmfoundry.data.transforms import EvalTransform, TrainTransform

_HOMES = {
    "DecodeLimits": "decode",
    "EvalTransform": "transforms",
    "Loader": "loader",
    "PairEncoder": "pairs",
    "Pool": "reader",
    "Ragged": "ragged",
    "RawSample": "sample",
    "Sample": "sample",
    "Source": "loader",
    "TrainTransform": "transforms",
    "UnreadableSample": "decode",
    "write_shards": "shards",
}

__all__ = [
    "DecodeLimits",
    "EvalTransform",
    "Loader",
    "PairEncoder",
    "Pool",
    "Ragged",
    "RawSample",
    "Sample",
    "Source",
    "TrainTransform",
    "UnreadableSample",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
