"""stages/filter_encoders.py: each kind of CLIP gives what its own library gives, by its own preprocessing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops
from mmfoundry.stages.filter_encoders import TorchEncoder, dtype_of, load_encoder
from tests.data.conftest import smooth
from tests.stages import clip_folders

CPU = torch.device("cpu")
PICTURES = [smooth(0, 40, 60), smooth(1, 32, 32), smooth(2, 90, 50)]
CAPTIONS = ["picture 1", "another line for 2", "", "picture " * 40]


def embedded(encoder: TorchEncoder) -> tuple[np.ndarray, np.ndarray]:
    # captions one by one: what a caption gives must not depend on the longest beside it
    texts = np.concatenate([encoder.embed_texts([caption]) for caption in CAPTIONS])
    return encoder.embed_images([encoder.prepare(pixels) for pixels in PICTURES]), texts


def normalised(rows: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(rows.detach(), dim=-1).numpy()


def by_open_clip(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    declare_missing_ops()
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    images = torch.stack([transform(Image.fromarray(pixels)) for pixels in PICTURES])
    return normalised(model.eval().encode_image(images)), normalised(model.encode_text(tokens))


def by_transformers(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    declare_missing_ops()
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    processor = AutoImageProcessor.from_pretrained(folder)
    images = processor(images=[Image.fromarray(pixels) for pixels in PICTURES], return_tensors="pt")
    output = model(**tokens, **images)
    return normalised(output.image_embeds), normalised(output.text_embeds)


@pytest.mark.parametrize(
    ("write", "reference"),
    [
        (clip_folders.open_clip_folder, by_open_clip),
        (clip_folders.custom_open_clip_folder, by_open_clip),
        (clip_folders.transformers_folder, by_transformers),
        (clip_folders.siglip_folder, by_transformers),
    ],
)
def test_the_embeddings_are_those_of_its_own_library(
    write: Callable[[Path], Path], reference: Callable[[Path], tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    folder = write(tmp_path / "model")
    found = embedded(load_encoder(folder, None, CPU, "auto"))
    for ours, theirs in zip(found, reference(folder), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
        assert np.abs(ours @ ours.T).min() < 0.9999  # different inputs give different vectors


def test_one_model_in_three_layouts_gives_one_embedding(tmp_path: Path) -> None:
    ours = embedded(load_encoder(clip_folders.ours(tmp_path / "ours"), None, CPU, "fp32"))
    for write in (clip_folders.open_clip_folder, clip_folders.transformers_folder):
        theirs = embedded(load_encoder(write(tmp_path / write.__name__), None, CPU, "fp32"))
        np.testing.assert_allclose(ours[1], theirs[1], atol=2e-6)
        # their pictures are resized as floats or as bytes, with one rounding more or less
        np.testing.assert_allclose(ours[0], theirs[0], atol=2e-2)


def test_a_weights_file_with_an_architecture_of_open_clip(tmp_path: Path) -> None:
    declare_missing_ops()
    import open_clip

    torch.manual_seed(0)
    name = "test-tiny"
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(clip_folders.CONFIG))
    open_clip.add_model_config(file)
    model = open_clip.create_model(name)
    weights = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    texts = embedded(load_encoder(weights, name, CPU, "auto"))[1]
    tokens = open_clip.get_tokenizer(name)(CAPTIONS)
    np.testing.assert_allclose(texts, normalised(model.eval().encode_text(tokens)), atol=2e-6)
    with pytest.raises(ConfigError, match=r"give test-tiny/TAG"):
        load_encoder(None, name, CPU, "auto")
    with pytest.raises(ConfigError, match="not an architecture"):
        load_encoder(weights, "ViT-nothing", CPU, "auto")


def test_weights_that_cannot_be_downloaded_are_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to download weights for tag 'openai'. Last error: " + "Please check. " * 100)

    declare_missing_ops()
    monkeypatch.setattr("open_clip.create_model", offline)
    with pytest.raises(MissingInput) as caught:
        load_encoder(None, "ViT-B-32/openai", CPU, "auto")
    assert str(caught.value) == (
        "ViT-B-32/openai: open_clip cannot load it (Failed to download weights for tag 'openai'); a model on this "
        "machine is named by `model` in place of `open_clip`"
    )


def test_half_precision_is_close_and_not_equal(tmp_path: Path) -> None:
    folder = clip_folders.ours(tmp_path / "ours")
    full, half = (embedded(load_encoder(folder, None, CPU, precision)) for precision in ("fp32", "bf16"))
    for exact, rough in zip(full, half, strict=True):
        assert 0 < np.abs(exact - rough).max() < 0.05
        np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-6)
    assert dtype_of("auto", CPU) == torch.float32
    assert dtype_of("fp16", CPU) == torch.float16


def test_folders_without_a_whole_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no CLIP here"):
        load_encoder(tmp_path, None, CPU, "auto")
    folder = clip_folders.open_clip_folder(tmp_path / "no-weights")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(MissingInput, match="no-weights: open_clip cannot load it"):
        load_encoder(folder, None, CPU, "auto")  # open_clip itself would go on with random weights
    folder = clip_folders.transformers_folder(tmp_path / "no-processor")
    (folder / "processor_config.json").unlink()
    with pytest.raises(MissingInput, match="no-processor: transformers cannot load"):
        load_encoder(folder, None, CPU, "auto")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DamagedInput, match="not JSON"):
        load_encoder(tmp_path, None, CPU, "auto")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = clip_folders.transformers_folder(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(clip_folders.clip().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MissingInput, match="transformers cannot load"):
        load_encoder(folder, None, CPU, "auto")
