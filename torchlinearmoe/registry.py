"""A registry: names to things, iterated by name; aliases and unlisted names resolve but are not iterated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names to things in the order they were added. An unknown name is a KeyError that lists the known ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._unlisted: set[str] = set()

    def add(self, name: str, thing: T, aliases: tuple[str, ...] = (), listed: bool = True) -> T:
        """Register `thing`; a name can be taken only once. Unlisted, it is found by name and not iterated."""
        for key in (name, *aliases):
            if key in self._things or key in self._aliases:
                raise ValueError(f"{self.kind} '{key}' is registered twice")
        self._things[name] = thing
        self._aliases.update(dict.fromkeys(aliases, name))
        if not listed:
            self._unlisted.add(name)
        return thing

    def names(self) -> list[str]:
        """Every registered name, unlisted ones too; no aliases."""
        return list(self._things)

    def canonical(self, name: str) -> str:
        """The registered name behind an alias; any other name unchanged."""
        return self._aliases.get(name, name)

    def __getitem__(self, name: str) -> T:
        try:
            return self._things[self.canonical(name)]
        except KeyError:
            raise KeyError(f"unknown {self.kind} '{name}'; known: {', '.join(self._things)}") from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.canonical(name) in self._things

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._things if name not in self._unlisted)

    def __len__(self) -> int:
        return len(self._things) - len(self._unlisted)
