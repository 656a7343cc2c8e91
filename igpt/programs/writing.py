"""Pictures are written by a thread of their own, while the next ones are drawn."""

import threading
from collections.abc import Callable

import torch


class Writer:
    """Inside of its context a thread calls write(tokens), all that were `put` so far, whenever there are new ones.

    Nobody waits for a write: one that is slow finds more pictures the next time. Leaving the context, be it by Ctrl-C,
    waits until all are written. What write raises comes out of the next `put`, or of the end."""

    def __init__(self, write: Callable[[torch.Tensor], object]):
        self.write, self.drawn, self.written, self.is_over, self.error = write, [], 0, False, None
        self.changed, self.thread = threading.Condition(), threading.Thread(target=self.run, name="writer")

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.is_over or len(self.drawn) > self.written)
                drawn = list(self.drawn)
            if len(drawn) == self.written:
                return
            try:
                self.write(torch.cat(drawn))
            except Exception as error:  # raised where somebody sees it
                self.error = error
                return
            self.written = len(drawn)

    def put(self, tokens: torch.Tensor) -> None:
        if self.error is not None:
            raise self.error
        with self.changed:
            self.drawn.append(tokens)
            self.changed.notify()

    def __enter__(self) -> "Writer":
        self.thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        with self.changed:
            self.is_over = True
            self.changed.notify()
        self.thread.join()
        if self.error is not None and kind is None:
            raise self.error
