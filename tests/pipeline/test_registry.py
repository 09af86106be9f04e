"""Registries: duplicates refused, unknown names answered with the known ones, packages discovered when first read."""

import sys
from pathlib import Path

import pytest

from mmfoundry.pipeline.errors import UnknownName
from mmfoundry.pipeline.registry import Registry


def make() -> Registry:
    things: Registry = Registry("thing")

    @things.register("plus")
    def plus(a: int) -> int:
        """Add one.

        And a second paragraph.
        """
        return a + 1

    return things


def test_a_registered_entry_is_itself() -> None:
    things = make()
    assert things["plus"](1) == 2
    assert list(things) == ["plus"]
    assert "plus" in things
    assert "minus" not in things


def test_duplicates_are_refused() -> None:
    things = make()
    with pytest.raises(ValueError, match=r"thing 'plus' is registered twice: in .*test_registry and in builtins"):
        things.register("plus")(print)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"unknown thing 'pluss'; did you mean plus\? known: plus"):
        make()["pluss"]


def test_describe_gives_one_line_and_the_source() -> None:
    (row,) = make().describe()
    assert (row.name, row.summary) == ("plus", "Add one.")
    assert row.source.endswith("test_registry")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "made_up_things"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from mmfoundry.pipeline.registry import Registry\nTHINGS = Registry('thing', package='made_up_things')\n"
    )
    (folder / "one.py").write_text("from made_up_things import THINGS\nTHINGS.register('one')(print)\n")
    (folder / "two.py").write_text(
        "from made_up_things import THINGS\nassert 'one' in THINGS\nTHINGS.register('two')(len)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "made_up_things"


def test_a_package_is_read_when_the_registry_is(package: str) -> None:
    import made_up_things

    assert f"{package}.one" not in sys.modules
    assert sorted(made_up_things.THINGS) == ["one", "two"]
    assert made_up_things.THINGS["two"] is len


def test_entry_points_add_to_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installed package would: metadata on the path, found by importlib.metadata."""
    (tmp_path / "outside_thing.py").write_text('def outside():\n    """From elsewhere."""\n')
    info = tmp_path / "outside_thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-thing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmfoundry.thing]\noutside = outside_thing:outside\n")
    monkeypatch.syspath_prepend(tmp_path)
    things = make()
    assert [row.name for row in things.describe()] == ["outside", "plus"]
    assert things.describe()[0].source == "outside_thing"
