"""`python slow_save.py SECONDS RECIPE [overrides]`: the train command, with checkpoint files written SECONDS late.

While a file waits, training goes on: whoever kills the process then kills it in the middle of a save.
"""

import sys
import time
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from torchlinearmoe import train
from torchlinearmoe.checkpoint.storage import Writer


def late(seconds: float) -> Any:
    """`Writer.write_data`, after `seconds`."""

    def write_data(self: Writer, *args: Any) -> Any:
        time.sleep(seconds)
        return FileSystemWriter.write_data(self, *args)

    return write_data


if __name__ == "__main__":
    Writer.write_data = late(float(sys.argv[1]))  # type: ignore[method-assign]
    sys.exit(train.main(sys.argv[2:]))
