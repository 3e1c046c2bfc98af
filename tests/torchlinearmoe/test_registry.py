"""A registry resolves aliases, iterates names only, and tells what it knows."""

from __future__ import annotations

import pytest

from torchlinearmoe.errors import RecipeError, UserError, nearest
from torchlinearmoe.registry import Registry


def _registry() -> Registry[int]:
    registry: Registry[int] = Registry("thing")
    registry.add("one", 1)
    assert registry.add("two", 2, ("deux", "zwei")) == 2
    return registry


def test_aliases_resolve_but_are_not_iterated():
    registry = _registry()
    assert list(registry) == ["one", "two"] and len(registry) == 2
    assert registry["deux"] == registry["two"] == 2
    assert "zwei" in registry and "drei" not in registry and 2 not in registry
    assert registry.canonical("zwei") == "two" and registry.canonical("drei") == "drei"
    assert dict(registry) == {"one": 1, "two": 2}
    assert registry.get("drei") is None


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(KeyError, match="unknown thing 'three'; known: one, two"):
        _registry()["three"]


@pytest.mark.parametrize(("name", "aliases"), [("one", ()), ("deux", ()), ("three", ("one",)), ("three", ("zwei",))])
def test_a_name_is_taken_once(name: str, aliases: tuple[str, ...]):
    with pytest.raises(ValueError, match="registered twice"):
        _registry().add(name, 3, aliases)


def test_the_nearest_word_is_named_and_all_are():
    found = nearest("num_layer", ["num_layers", "num_heads"])
    assert found == "did you mean 'num_layers'? legal: num_heads, num_layers"
    assert nearest("zzz", ["b", "a"]) == "legal: a, b"


def test_a_users_error_is_one_line_whatever_it_quotes():
    assert str(RecipeError("model.a\nb: unknown\r\nkey")) == "model.a b: unknown key"
    assert issubclass(RecipeError, UserError) and issubclass(UserError, ValueError)
