"""Names: listed ones, modules of one's own, and installed packages."""

import sys

import pytest

from models.config import PRESETS, get_config
from models.named import find_named

LISTED = {"one": 1, "my_module:one": 10}


def find(name, listed=LISTED):
    return find_named(
        name,
        listed,
        kind="lucky number",
        what="an integer",
        is_one=lambda found: isinstance(found, int),
    )


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder that Python imports from, with one module."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lucky.py").write_text(
        "one = 7\ntext = 'seven'\nclass In:\n  two = 2\n"
    )
    yield tmp_path
    for name in ("lucky", "broken"):
        sys.modules.pop(name, None)


def installed(folder, text):
    """A package's metadata, as pip leaves it, with these entry points."""
    info = folder / "someone-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someone\nVersion: 1\n")
    (info / "entry_points.txt").write_text(text)


def test_a_listed_name_comes_first(modules):
    assert find("one") == 1
    assert find("my_module:one") == 10


def test_a_module_and_attribute_are_imported(modules):
    assert find("lucky:one") == 7
    assert find("lucky:In.two") == 2


def test_an_installed_package_names_its_own(modules):
    group = "[disagg_jax.lucky_numbers]\nseven = lucky:one\none = lucky:text\n"
    installed(modules, group)
    assert find("seven") == 7
    assert find("one") == 1  # listed ones come first
    with pytest.raises(ValueError, match=r"of \['my_module:one', 'one', 'seven'\] or"):
        find("eight")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two", r"lucky number: expected one of \['my_.*'one'\] or package.*got 'two'"),
        ("nowhere:one", "lucky number: expected package.module:.*No module.*nowhere"),
        ("lucky:two", "'lucky:two'.*no attribute 'two'"),
        ("lucky:one:two", "expected package.module:attribute .* got 'lucky:one:two'"),
        (
            "lucky:text",
            "lucky number: expected an integer at 'lucky:text', got 'seven'",
        ),
    ],
)
def test_unknown_names_say_what_is_known_or_was_expected(modules, name, message):
    with pytest.raises(ValueError, match=message):
        find(name)


def test_a_fault_inside_a_module_is_seen_as_it_is(modules):
    (modules / "broken.py").write_text("one = 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        find("broken:one")


def test_a_model_of_ones_own_is_found_by_name(modules):
    source = "from models.config import PRESETS\nmine = PRESETS['tiny']\n"
    (modules / "lucky.py").write_text(source)
    assert get_config("lucky:mine") == PRESETS["tiny"]
    assert get_config("mine", {"mine": PRESETS["m32"]}) == PRESETS["m32"]
    with pytest.raises(ValueError, match="model: expected a ModelConfig at 'lucky:PRE"):
        get_config("lucky:PRESETS")
