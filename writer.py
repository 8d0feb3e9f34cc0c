"""Work that goes on beside the main thread: in order, one thing at a time, with bounded memory."""

import queue
import sys
import threading


class Writer:
    """Calls `work` on a thread of its own, one call after another, while the `with` block goes on.

    One call runs and one waits at most, which bounds the memory. After a call that raises none is made; what it raised is
    raised by the next `put` or `check`, or at the end. At the end, whatever the reason, the calls that were put are made; a
    second Ctrl-C does not wait for them.
    """

    def __init__(self, work):
        self.work, self.calls, self.error = work, queue.Queue(1), None
        self.thread = threading.Thread(target=self._run, daemon=True)  # daemon: Python does not wait for it either

    def _run(self):
        while (arguments := self.calls.get()) is not None:
            try:
                if self.error is None:
                    self.work(*arguments)
            except BaseException as error:
                self.error = error
            del arguments  # before waiting for the next: they are large

    def check(self, *_):
        if self.error is not None:
            raise self.error

    def put(self, *arguments):
        self.check()
        self.calls.put(arguments)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        if interrupted := kind is KeyboardInterrupt and self.error is None:
            print("\nfinishing what is generated; Ctrl-C again ends at once", file=sys.stderr)
        self.calls.put(None)
        self.thread.join()
        self.check()
        if interrupted:
            raise KeyboardInterrupt("the same command goes on") from None
