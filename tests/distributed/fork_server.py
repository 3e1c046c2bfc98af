"""Processes that start at once: forked off a server that has imported what they need.

    this process                     server                              forked process
    ------------                     ------                              --------------
    ForkServer(modules)        -->   imports the modules, once
    server.fork(serve, *args)  -->   os.fork()                     -->   serve(connection, *args), then it ends
    process.exit_code()        -->   os.waitpid()

A fork shares its server's hash seed, so that sets have one order in all of them. Ranks that are forked off several
servers still show what depends on that order.
"""

import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

Serve = Callable[..., None]


class Forked:
    """A process that a server has forked, and this end of the connection to it."""

    def __init__(self, server: "ForkServer", pid: int, connection: Connection) -> None:
        self.server, self.pid, self.connection = server, pid, connection
        self._exit_code: int | None = None

    def exit_code(self) -> int:
        """Wait for the end of the process; minus the signal that ended it, as in `multiprocessing`."""
        if self._exit_code is None:
            self._exit_code = self.server.wait_for(self.pid)
        return self._exit_code

    def kill(self) -> None:
        """End it, if it still runs."""
        self.connection.close()
        if self._exit_code is None:
            os.kill(self.pid, signal.SIGKILL)  # one that has ended waits for the server to ask for its status
            self.exit_code()


class ForkServer:
    """A process that has imported `modules` under `environment`, and forks."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        arguments = (other_end, list(modules), dict(environment))
        self._process = context.Process(target=_fork_on_demand, args=arguments, daemon=True)
        self._process.start()
        other_end.close()

    def fork(self, serve: Serve, *args: Any) -> Forked:
        """A process that runs ``serve(connection, *args)``."""
        assert self._process.pid is not None
        ours, theirs = multiprocessing.Pipe()
        self._connection.send((serve, args))
        send_handle(self._connection, theirs.fileno(), self._process.pid)
        theirs.close()
        return Forked(self, self._connection.recv(), ours)

    def wait_for(self, pid: int) -> int:
        """The exit code of a forked process, once it has ended."""
        self._connection.send(pid)
        return self._connection.recv()

    def stop(self) -> None:
        """End the server; what it has forked must have ended before."""
        self._connection.close()
        self._process.kill()
        self._process.join()


def _fork_on_demand(requests: Connection, modules: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    for module in modules:
        importlib.import_module(module)
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return
        if isinstance(request, int):
            requests.send(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]))
            continue
        serve, args = request
        handle = recv_handle(requests)
        pid = os.fork()
        if pid == 0:
            requests.close()
            serve(Connection(handle), *args)
            os._exit(0)
        os.close(handle)
        requests.send(pid)
