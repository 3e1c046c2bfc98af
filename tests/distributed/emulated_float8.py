"""Runs in float8 on a CPU: torchao's emulation, which rounds as a GPU does and multiplies in a wider type."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tiny_run import Result, Settings, run


@contextmanager
def emulated() -> Iterator[None]:
    """Trainers built inside take float8 on any machine and in any type."""
    from torchlinearmoe import trainer
    from torchlinearmoe.parallel import float8

    scaling, check = float8.scaling, trainer.check_machine
    float8.scaling = lambda kind: replace(scaling(kind), emulate=True)
    trainer.check_machine = lambda *_: None
    try:
        yield
    finally:
        float8.scaling, trainer.check_machine = scaling, check


def run_emulated(rank: int, tables: Settings, moved: bool = True) -> Result:
    """`tiny_run.run` inside."""
    with emulated():
        return run(rank, tables, moved)
