"""Papermill's engine, mended: a cell whose answer goes unnoticed no longer hangs, and one that takes too long is stopped.

nbclient plays the browser for an output widget (`ipywidgets.interact`): what the widget catches is sent back to the kernel, on the socket
on which the cell's reply is awaited. Such a send can swallow the socket's one notice that the reply is there: the kernel is idle, and the
executor waits for ever. Asking the socket for its events after each message restores the notice.

Registered with papermill under the name `ENGINE` on import.
"""

import zmq
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.log import logger

ENGINE = "vlmedit"
STOPPED = (CellTimeoutError, DeadKernelError)  # what papermill raises for no failure of the cell's own code


class Client(PapermillNotebookClient):
    def process_message(self, *arguments, **keywords):
        try:
            return super().process_message(*arguments, **keywords)
        finally:
            self.kc.shell_channel.socket.get(zmq.EVENTS)  # has pyzmq look for replies that it was not woken for


class Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, start_timeout=60, execution_timeout=None, **others):
        """As papermill's own, with the mended client. `execution_timeout`: seconds that one cell may take; None is no limit."""
        names = ("log_output", "stdout_file", "stderr_file")
        kept = {name: others[name] for name in names if name in others}
        Client(nb_man, timeout=execution_timeout, startup_timeout=start_timeout, kernel_name=kernel_name, log=logger, **kept).execute()


papermill_engines.register(ENGINE, Engine)
