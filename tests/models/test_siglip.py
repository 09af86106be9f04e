"""SigLIP's towers: what is particular to them; equality with the peers is in interop/."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import SiglipConfig, SiglipModel

from mmfoundry.models.adapters.clip_lora import ClipLoraConfig, add_clip_lora
from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.flops import clip_work, text_flops, vision_flops
from mmfoundry.models.interop.transformers_siglip import to_siglip_config
from mmfoundry.models.lock import lock_image_tower, lock_text_tower, take_towers
from mmfoundry.models.param_groups import TowerRate, TowerRates, clip_param_groups
from mmfoundry.models.vision import ProbeAttention, drop_patches
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError
from tests.models.test_flops import counted
from tests.models.test_param_groups import rate_of
from tests.models.tiny import SIGLIP, pairs, tiny_clip, tiny_siglip, tokens


def full_batch(rows: int = 5) -> dict[str, torch.Tensor]:
    return {"image": pairs(rows)["image"], "text": tokens([2, 5, 9, 3, 7][:rows])}


def test_attention_from_a_probe_is_pytorchs_and_plain_math() -> None:
    torch.manual_seed(0)
    ours, theirs = ProbeAttention(12, 3).double(), torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_()
    ours.load_state_dict(theirs.state_dict())  # strict: the names are PyTorch's
    x = torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True)
    probe = torch.randn(2, 1, 12, dtype=torch.double, requires_grad=True)
    expected = theirs(probe, x, x, need_weights=False)[0]
    torch.testing.assert_close(ours(probe, x), expected)
    q, k, v = (
        F.linear(source, weight, bias).unflatten(-1, (3, 4)).transpose(1, 2)
        for source, weight, bias in zip(
            (probe, x, x), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
        )
    )
    plain = ((q @ k.mT / math.sqrt(4)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours(probe, x), theirs.out_proj(plain))
    found, wanted = (torch.autograd.grad(each.sum(), (x, probe)) for each in (ours(probe, x), expected))
    torch.testing.assert_close(found, wanted)


def test_padding_is_read_and_never_cut() -> None:
    model, batch = tiny_siglip().double(), full_batch()["text"]
    before = model.encode_text(batch)
    padded = batch.clone()
    padded[0, 6] = 3  # behind the end of the first caption
    after = model.encode_text(padded)
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1:], before[1:])
    with pytest.raises(ValueError, match="captions of 8 tokens, but this tower reads their padding: pad to 9"):
        model.encode_text(batch[:, :8])
    assert model.text_model.trimmed(batch) is batch
    assert tiny_clip().text_model.trimmed(tokens([2, 4])).shape == (2, 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["argmax", "last"])
def test_the_last_layer_for_one_row_is_the_whole_last_layer(causal: bool, pool: str) -> None:
    text = SIGLIP["text_cfg"] | {"no_causal_mask": not causal, "pool_type": pool}
    model, batch = tiny_siglip(text_cfg=text).double(), full_batch()["text"]
    tower = model.text_model
    hidden = tower.encoder(tower.embeddings(batch), is_causal=causal)
    row = batch.argmax(1) if pool == "argmax" else torch.full((5,), 8)
    expected = tower.head(tower.final_layer_norm(hidden[torch.arange(5), row]))
    torch.testing.assert_close(model.encode_text(batch), F.normalize(expected, dim=-1))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_step_costs_what_torch_counts(layers: int) -> None:
    config = parse(ClipConfig, SIGLIP)
    text, vision = (each.model_copy(update={"layers": layers}) for each in (config.text_cfg, config.vision_cfg))
    model = CLIP.from_seed(config.model_copy(update={"text_cfg": text, "vision_cfg": vision}), 0)
    batch = full_batch()
    assert counted(model, batch, backward=True) == clip_work(model)(batch).flops
    assert counted(model, batch, backward=False) == 5 * (vision_flops(model.config)[0] + text_flops(model.config, 9))
    assert clip_work(model)(batch).tokens == 5 * (4 + 9)


def test_an_untrained_vision_tower_starts_as_transformers() -> None:
    wide = {"width": 64, "head_width": 16, "patch_size": 4, "mlp_ratio": 3.0}
    config = parse(ClipConfig, {**SIGLIP, "embed_dim": 64, "vision_cfg": SIGLIP["vision_cfg"] | wide})
    ours = CLIP.from_seed(config, 0).state_dict()
    torch.manual_seed(1)
    theirs = SiglipModel(SiglipConfig(**to_siglip_config(config))).state_dict()
    for name, value in ours.items():
        if not name.startswith("vision_model.") or name.endswith(
            ("head.attention.out_proj.weight", "patch_embedding.weight")
        ):
            continue
        slack = 6 / value.numel() ** 0.5
        reference = theirs[name].std(correction=0)
        torch.testing.assert_close(
            value.std(correction=0), reference, rtol=slack, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
        if reference > 0 and value.numel() > 500:
            assert (value.abs().max() > 1.8 * reference) == (theirs[name].abs().max() > 1.8 * reference), name
    bound = math.sqrt(6 / 128)  # transformers forgets the head's output projection, which has Xavier's start, too
    head = ours["vision_model.head.attention.out_proj.weight"].abs().max()
    assert 0.95 * bound < head <= bound
    patches, fan_in = ours["vision_model.embeddings.patch_embedding.weight"], 3 * 4 * 4
    torch.testing.assert_close(patches.std(), torch.tensor(fan_in**-0.5), rtol=0.1, atol=0)
    assert patches.abs().max() <= 2 / 0.8796 * fan_in**-0.5  # LeCun's start, cut off, as Flax has it


def test_the_same_seed_gives_the_same_weights_and_all_are_set() -> None:
    one, other = (CLIP.from_seed(parse(ClipConfig, SIGLIP), 7).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(value.isfinite().all() for value in one.values())
    assert not one["text_model.head.bias"].any()


def test_what_does_not_decay_and_how_fast_the_heads_learn() -> None:
    model = tiny_siglip()
    assert {"vision_model.head.probe", "vision_model.head.attention.in_proj_bias"} <= model.no_weight_decay()
    decays = {name for name, _ in model.named_parameters()} - model.no_weight_decay()
    assert {"vision_model.head.attention.in_proj_weight", "text_model.head.weight"} <= decays
    rates = TowerRates(image=TowerRate(lr_scale=0.5, layer_decay=0.8), text=TowerRate(lr_scale=2.0, layer_decay=0.1))
    groups = clip_param_groups(model, 0.1, rates)
    vision, text = model.vision_model, model.text_model
    assert vision.head is not None
    assert text.head is not None
    for parameter, rate in {
        vision.head.probe: 0.5,
        vision.head.mlp.fc1.weight: 0.5,
        vision.embeddings.patch_embedding.weight: 0.5 * 0.8**4,
        text.head.weight: 2.0,
        text.embeddings.position_embedding.weight: 2 * 0.1**3,
    }.items():
        torch.testing.assert_close(rate_of(groups, parameter), rate)
    grouped = [id(each) for group in groups for each in group["params"]]
    assert sorted(grouped) == sorted(id(each) for each in model.parameters())


def test_locked_towers_and_taken_ones() -> None:
    model = tiny_siglip()
    lock_image_tower(model, 1)
    lock_text_tower(model)
    learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(name.startswith(("vision_model.head.", "logit_")) for name in learns)
    assert "vision_model.head.probe" in learns
    with pytest.raises(ConfigError, match="this tower has 5 groups"):
        lock_image_tower(tiny_siglip(), 6)
    mixed = take_towers(tiny_siglip(1), tiny_siglip(2), "text")
    assert torch.equal(mixed.text_model.head.weight, tiny_siglip(1).text_model.head.weight)
    assert torch.equal(mixed.vision_model.head.probe, tiny_siglip(2).vision_model.head.probe)


def test_patches_are_dropped_where_there_is_no_class_token() -> None:
    torch.manual_seed(0)
    position = torch.arange(16.0)[None, :, None].expand(8, -1, 2)
    kept = drop_patches(position, 0.75, prefix=0)[:, :, 0]
    assert kept.shape == (8, 4)
    assert all(len(set(row)) == 4 for row in kept.tolist())
    assert (kept == 0).any()  # the first is a patch as any other
    vision = SIGLIP["vision_cfg"] | {"patch_dropout": 0.5}
    model, images = tiny_siglip(vision_cfg=vision), full_batch()["image"]
    whole = model.eval().encode_image(model.pixels(images))
    assert torch.equal(whole, tiny_siglip().eval().encode_image(model.pixels(images)))
    assert not torch.equal(model.train().encode_image(model.pixels(images)), whole)


def test_adapters_are_where_siglip_model_has_them() -> None:
    model = tiny_siglip()
    before = model(full_batch())
    add_clip_lora(model, ClipLoraConfig(rank=2), 0)
    torch.testing.assert_close(model(full_batch()).text_bD, before.text_bD)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert "text_model.head" in adapted
    assert "vision_model.encoder.layers.2.mlp.fc1" in adapted
    assert not any(name.startswith("vision_model.head") for name in adapted)
    assert adapted <= {name for name, _ in SiglipModel(SiglipConfig(**to_siglip_config(model.config))).named_modules()}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"embed_dim": 16}, "embed_dim 16 is not vision_cfg.width 24"),
        ({"quick_gelu": True}, "quick_gelu and act_kwargs.approximate"),
        ({"text_cfg": {"proj_bias": True, "proj_type": "none"}}, "proj_bias is of a projection"),
        ({"text_cfg": {"proj_type": "none", "width": 32, "heads": 2}}, "width 32 is not embed_dim 24"),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "lower"}}}, "give hf_tokenizer_name"),
        ({"vision_cfg": {"image_size": 4, "patch_size": 8}}, "patch_size 8 is more than image_size 4"),
    ],
)
def test_configs_that_do_not_fit(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ClipConfig, {**SIGLIP, **tree})
