"""Configs: what YAML may say, how an error names the key, which fields are inputs, what a digest depends on."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator

from mmfoundry.pipeline.config import (
    ArtifactRef,
    Config,
    Neutral,
    StageConfig,
    apply_overrides,
    digest_config,
    inputs_of,
    load_yaml,
    parse,
)
from mmfoundry.pipeline.errors import ConfigError, MissingInput, UnknownName


class Optimizer(Config):
    """How weights change."""

    type: Literal["adamw", "sgd"] = Field("adamw", description="which one")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")


class Source(Config):
    """One pool."""

    path: ArtifactRef = Field(description="shards")
    weight: float = Field(1.0, gt=0, description="share of the samples")


class Text(Config):
    """A text tower, the other arm of a union."""

    context_length: int = Field(32, description="tokens")


class Demo(StageConfig):
    """A stage's config with everything in it."""

    pool: ArtifactRef = Field(description="raw tars")
    extra: ArtifactRef | None = Field(None, description="more tars")
    more: list[ArtifactRef] = Field([], description="yet more tars")
    data: list[Source] = Field([], description="weighted pools")
    tower: Text | Optimizer | None = Field(None, description="a union")
    named: dict[str, Source] = Field({}, description="pools by name")
    optimizer: Optimizer = Field(Optimizer(), description="how weights change")
    num_workers: Annotated[int, Neutral()] = Field(2, description="processes that read")
    objective: str = Field("info_nce", description="a registered name")

    @field_validator("objective")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != "info_nce":
            raise UnknownName(f"unknown objective {name!r}; known: info_nce")
        return name


def refusal(tree: dict, **named: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Demo, {"pool": "x"} | tree, "configs/demo.yaml", "pretrain", **named)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"optimizer": {"lrr": 1}}, "pretrain.optimizer.lrr is not a known key; did you mean lr?"),
        ({"pol": "y"}, "pretrain.pol is not a known key; did you mean pool?"),
        (
            {"data": [{"path": "a"}, {"path": "b", "wight": 2}]},
            "pretrain.data.1.wight is not a known key; did you mean weight?",
        ),
        ({"named": {"a": {"pth": "x"}}}, "pretrain.named.a.pth is not a known key; did you mean path?"),
        (
            {"tower": {"context_lenght": 3}},
            "pretrain.tower.context_lenght is not a known key; did you mean context_length?",
        ),
        ({"optimizer": {"zzzzzz": 1}}, "pretrain.optimizer.zzzzzz is not a known key; known keys: lr, type"),
        ({"optimizer": {"lr": "fast"}}, "pretrain.optimizer.lr: input should be a valid number"),
        ({"optimizer": {"lr": -1}}, "pretrain.optimizer.lr: input should be greater than 0, not -1"),
        ({"optimizer": {"lr": float("nan")}}, "pretrain.optimizer.lr: input should be a finite number"),
        ({"optimizer": {"type": "adam"}}, "pretrain.optimizer.type: input should be 'adamw' or 'sgd', not 'adam'"),
        ({"data": 3}, "pretrain.data: input should be a valid list, not 3"),
        ({"seed": -1}, "pretrain.seed: input should be greater than or equal to 0, not -1"),
        ({"pool": 5}, "pretrain.pool: input should be a valid string, not 5"),
        ({"objective": "clip"}, "pretrain.objective: unknown objective 'clip'; known: info_nce"),
    ],
)
def test_an_error_names_file_key_and_way_out(tree: dict, expected: str) -> None:
    message = refusal(tree)
    assert message.startswith("configs/demo.yaml: ")
    assert expected in message


def test_a_missing_key_says_what_it_is_for() -> None:
    with pytest.raises(ConfigError, match=r"^f\.yaml: pool is missing \(raw tars\)$"):
        parse(Demo, {}, "f.yaml")


def test_a_misspelt_required_key_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Demo, {"pol": "x"}, "f.yaml")
    assert str(caught.value) == "f.yaml: pol is not a known key; did you mean pool?"


def test_an_override_is_blamed_on_the_command_line() -> None:
    assert refusal({"optimizer": {"lrr": 1}}, overridden=["pretrain.optimizer.lrr"]).startswith("command line: ")


def test_many_errors_stay_one_line() -> None:
    message = refusal({f"k{i}": i for i in range(9)})
    assert message.endswith("(and 6 more)")


def test_configs_are_frozen() -> None:
    config = parse(Demo, {"pool": "x"})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_yaml_means_what_people_mean(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("lr: 1e-3\nnegative: -2E5\nlanguage: no\nflag: true\nnothing:\nword: on\nversion: 1.5\n")
    assert load_yaml(file) == {
        "lr": 1e-3, "negative": -2e5, "language": "no", "flag": True, "nothing": None, "word": "on", "version": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "line 3"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4: key 'c' is given twice"),
        ("a: 1\na: 2\n", "line 2: key 'a' is given twice"),
        ("- a\n- b\n", "the top level must be"),
        ("a: !!python/object/apply:os.system [echo]\n", "line 1: could not determine a constructor"),
        ("? [a, b]\n: 1\n", "a key must be a plain word"),
        ("a:\tb\n\t- c\n", "line"),
    ],
)
def test_yaml_errors_name_the_line(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(file)
    assert str(caught.value).startswith(str(file))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("a: 1\n")
    with pytest.raises(MissingInput, match=r"no such file; did you mean .*demo\.yaml\?"):
        load_yaml(tmp_path / "dmo.yaml")
    with pytest.raises(MissingInput, match="a folder, not a file"):
        load_yaml(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(tmp_path / "a.yaml")


def test_overrides_set_nested_keys_and_leave_the_original() -> None:
    tree = {"optimizer": {"lr": 1}, "data": [{"path": "a"}]}
    changed = apply_overrides(tree, ["optimizer.lr=1e-4", "data.0.path=b", "new.deep.key=[1, two]", "text=a=b"])
    assert changed == {
        "optimizer": {"lr": 1e-4}, "data": [{"path": "b"}], "new": {"deep": {"key": [1, "two"]}}, "text": "a=b",
    }  # fmt: skip
    assert tree == {"optimizer": {"lr": 1}, "data": [{"path": "a"}]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr", "is not key=value"),
        ("=3", "is not key=value"),
        ("a..b=3", "is not key=value"),
        ("optimizer.lr.x=3", "optimizer.lr is a plain value"),
        ("data.7.path=x", "data is a list of 1"),
        ("data.first=x", "data is a list of 1"),
        ("optimizer={a: [}", "is not a YAML value"),
    ],
)
def test_overrides_that_lead_nowhere_are_refused(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        apply_overrides({"optimizer": {"lr": 1}, "data": [{"path": "a"}]}, [override])


def full(**changes: object) -> Demo:
    tree = {
        "pool": "p", "extra": "e", "more": ["m0", "m1"], "data": [{"path": "d0"}], "named": {"n": {"path": "n0"}},
    }  # fmt: skip
    return parse(Demo, tree | changes)


def test_inputs_are_found_wherever_they_are() -> None:
    assert inputs_of(full()) == {
        "pool": "p", "extra": "e", "more.0": "m0", "more.1": "m1", "data.0.path": "d0", "named.n.path": "n0",
    }  # fmt: skip
    assert inputs_of(parse(Demo, {"pool": "p"})) == {"pool": "p"}


def test_the_digest_depends_on_what_changes_the_result_only() -> None:
    digest = digest_config(full())
    assert digest == digest_config(full(pool="elsewhere", num_workers=9, extra="moved"))
    assert digest != digest_config(full(seed=1))
    assert digest != digest_config(full(optimizer={"lr": 2e-3}))
    assert digest != digest_config(full(data=[{"path": "d0", "weight": 2}]))
    assert digest != digest_config(full(tower={"context_length": 8}))


def test_the_digest_is_pinned() -> None:
    """Digests are kept in users' manifests: a change of the scheme would repeat their finished work."""
    assert digest_config(parse(Text, {})) == hashlib.sha256(b'["Text", {"context_length": 32}]').hexdigest()
