"""Checkpoints changed on purpose: with checksums that fit what they hold now."""

import json
from pathlib import Path

from torchlinearmoe.checkpoint.sums import sum_file, sum_table


def reseal(checkpoint: Path) -> None:
    """Write the sums of the files as they are."""
    file = checkpoint / "state.json"
    table = json.loads(file.read_text())
    del table["crc32"]
    table["sums"] = {name: sum_file(checkpoint / name) for name in table["sums"]}
    file.write_text(json.dumps(table | {"crc32": sum_table(table)}))


def forget_sums(checkpoint: Path) -> None:
    """Make it one of an earlier version."""
    file = checkpoint / "state.json"
    table = json.loads(file.read_text())
    del table["sums"], table["crc32"]
    file.write_text(json.dumps(table))
