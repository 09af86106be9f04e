"""Writes a fastText model of a few words, so that one that is not packaged can be named."""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

MAGIC, VERSION = 793712314, 12
SUPERVISED, SOFTMAX = 3, 3
WORD, LABEL = 0, 1


def write_model(path: Path, languages: Mapping[str, str]) -> Path:
    """Write a model that takes a caption's language from its words.

    The file is laid out as fastText's `FastText::saveModel` does it: arguments, dictionary, input and output matrix.

    Args:
        path: of the file.
        languages: word -> code.
    """
    codes = sorted(set(languages.values()))
    words = ["</s>", *languages]
    entries = [(word, WORD) for word in words] + [(f"__label__{code}", LABEL) for code in codes]
    known = np.zeros((len(words), len(codes)), np.float32)
    for row, word in enumerate(words[1:], 1):
        known[row, codes.index(languages[word])] = 20
    no_subwords = (0, 0, 0)  # bucket, minn, maxn
    data = struct.pack("<2i", MAGIC, VERSION)
    data += struct.pack("<12id", len(codes), 5, 5, 1, 5, 1, SOFTMAX, SUPERVISED, *no_subwords, 100, 1e-4)
    data += struct.pack("<3i2q", len(entries), len(words), len(codes), len(words), -1)
    data += b"".join(text.encode() + b"\0" + struct.pack("<qb", 1, kind) for text, kind in entries)
    for matrix in (known, np.eye(len(codes), dtype=np.float32)):
        data += struct.pack("<b2q", 0, *matrix.shape) + matrix.tobytes()  # 0: not quantised
    path.write_bytes(data)
    return path
