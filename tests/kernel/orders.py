"""A guest that tells the host when to act: ``order NAME`` in its script returns when it is done."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tests.activation import listen_tcp
from tests.kernel.guest import HOST


class Orders:
    """What a guest may order, and what went wrong while it was done."""

    def __init__(self, listener: socket.socket, actions: Mapping[str, Callable[[], None]]) -> None:
        self._listener = listener
        self._actions = actions
        self.done: list[str] = []
        self.failure: Exception | None = None

    @property
    def shell(self) -> str:
        """The definition of the shell function, for the beginning of a script."""
        port = self._listener.getsockname()[1]
        return f'order() {{ test "$(echo $1 | nc {HOST} {port})" = done; }}'

    def serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rw") as stream:
                name = stream.readline().strip()
                if not name:
                    return
                try:
                    self._actions[name]()
                except Exception as error:
                    self.failure = error
                    return
                self.done.append(name)
                stream.write("done\n")


@contextmanager
def taking_orders(actions: Mapping[str, Callable[[], None]]) -> Iterator[Orders]:
    """Carry out what a guest orders. An action that failed fails the test on leaving."""
    with listen_tcp() as listener:
        orders = Orders(listener, actions)
        thread = threading.Thread(target=orders.serve)
        thread.start()
        try:
            yield orders
        finally:
            # An empty order is the last.
            with socket.create_connection(listener.getsockname()[:2]):
                pass
            thread.join()
            if orders.failure is not None:
                raise orders.failure
