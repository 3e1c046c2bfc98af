"""A process that has ended is not alive, even while nobody has taken notice."""

import os
import subprocess
import sys

from torchlinearmoe.processes import is_alive, started


def test_one_that_ended_is_not_alive_before_its_parent_knows():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_alive(child.pid) and is_alive(os.getpid())
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays as it is
    assert started(child.pid) == 0 and not is_alive(child.pid)
    child.wait()
    assert started(child.pid) is None and not is_alive(child.pid)
