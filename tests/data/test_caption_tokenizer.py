"""data/caption_tokenizer.py: the ids that transformers and open_clip give, from a folder's own files."""

import importlib.util
import json
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mmfoundry.data.caption_tokenizer import FolderTokenizer, caption_tokenizer, cleaned, load_tokenizer
from mmfoundry.data.text import clip_tokenizer
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

declare_missing_ops()

from open_clip.tokenizer import HFTokenizer  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

WORDS = ["<pad>", "</s>", "<unk>", "picture", "a", "Dog", "dog", "dogs", "s", "red", "apple", ",", "'", "!"]
TEXTS = ["a picture", "", "A Dog's picture, red_apple!", " dog \n\t dog ", "ﬁ &amp;amp; Ã©", "a " * 40]
LENGTH = 7


def write_words(folder: Path, config: bool = True, **said: str) -> Path:
    """A tokenizer of a few words that ends captions, as SigLIP's does."""
    base = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **said
    ).save_pretrained(folder)
    if not config:
        (folder / "tokenizer_config.json").unlink()
    return folder


def theirs(folder: Path, length: int = LENGTH) -> np.ndarray:
    made = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    return made["input_ids"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_ids_are_those_of_transformers(tmp_path: Path, side: str) -> None:
    tokenizer = FolderTokenizer(write_words(tmp_path, padding_side=side), LENGTH)
    found = tokenizer(TEXTS)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, theirs(tmp_path))
    np.testing.assert_array_equal(tokenizer.encode(TEXTS[0]), found[0])  # padded: what is behind is read
    assert tokenizer.vocab_size == len(WORDS)
    assert (found[0] == [4, 3, 1, 0, 0, 0, 0]).all() == (side == "right")


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_ids_are_those_of_open_clip(tmp_path: Path, clean: str) -> None:
    write_words(tmp_path)
    expected = HFTokenizer(str(tmp_path), context_length=LENGTH, clean=clean)(TEXTS).numpy()
    np.testing.assert_array_equal(FolderTokenizer(tmp_path, LENGTH, clean)(TEXTS), expected)  # type: ignore[arg-type]


def test_canonical_text() -> None:
    assert cleaned("A Dog's\n red_apple, &lt;3!", "canonicalize") == "a dogs red apple 3"
    assert cleaned("A Dog's\n red_apple, &lt;3!", None) == "A Dog's\n red_apple, &lt;3!"


def test_siglips_own_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="reads spiece.model; not among our dependencies")
    corpus = ["a picture of a dog", "another red apple on the left", "three green apples", "where is the dog"] * 20
    options = {"vocab_size": 55, "pad_id": -1, "bos_id": -1, "eos_id": 1, "unk_id": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "spiece"), minloglevel=2, **options
    )
    bare = FolderTokenizer(tmp_path, 12)(TEXTS)
    load_tokenizer(tmp_path).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).__class__.__name__ == "SiglipTokenizer"
    expected = theirs(tmp_path, 12)
    np.testing.assert_array_equal(bare, expected)
    tokenizer = FolderTokenizer(tmp_path, 12)
    np.testing.assert_array_equal(tokenizer(TEXTS), expected)
    np.testing.assert_array_equal(tokenizer("A DOG, the_left!"), tokenizer("a dog theleft"))  # its canonical form
    np.testing.assert_array_equal(ForkingPickler.loads(ForkingPickler.dumps(tokenizer))(TEXTS), expected)


def test_a_file_alone_is_what_it_says(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pad_token is not set"):
        FolderTokenizer(write_words(tmp_path / "bare", config=False), LENGTH)
    expected = theirs(write_words(tmp_path / "said"))
    (tmp_path / "said" / "tokenizer_config.json").unlink()
    file = tmp_path / "said" / "tokenizer.json"
    record = json.loads(file.read_text())
    record["padding"] = {
        "strategy": {"Fixed": 3},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    file.write_text(json.dumps(record))
    np.testing.assert_array_equal(FolderTokenizer(tmp_path / "said", LENGTH)(TEXTS), expected)


def test_siglips_class_without_its_vocabulary_is_what_tokenizer_json_says(tmp_path: Path) -> None:
    expected = theirs(write_words(tmp_path))
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "SiglipTokenizer"}))
    np.testing.assert_array_equal(FolderTokenizer(tmp_path, LENGTH)(TEXTS), expected)
    if importlib.util.find_spec("sentencepiece") is None:
        (tmp_path / "spiece.model").write_bytes(b"")
        with pytest.raises(MissingInput, match="pip install sentencepiece"):
            FolderTokenizer(tmp_path, LENGTH)


def test_it_goes_to_a_process_without_its_folder(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer(write_words(tmp_path / "gone"), LENGTH, "lower")
    expected = tokenizer(TEXTS)
    sent = ForkingPickler.dumps(tokenizer)
    shutil.rmtree(tmp_path / "gone")
    np.testing.assert_array_equal(ForkingPickler.loads(sent)(TEXTS), expected)


def test_by_name(tmp_path: Path) -> None:
    assert caption_tokenizer(None, 9) is clip_tokenizer(9)
    folder = str(write_words(tmp_path))
    assert caption_tokenizer(folder, LENGTH) is caption_tokenizer(folder, LENGTH)
    np.testing.assert_array_equal(caption_tokenizer(folder, LENGTH)(TEXTS), theirs(tmp_path))


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"neither tokenizer\.json nor spiece\.model"):
        FolderTokenizer(tmp_path, LENGTH)
    write_words(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DamagedInput, match="cannot load the tokenizer"):
        FolderTokenizer(tmp_path, LENGTH)
