"""What a pickle holds, without running any of it: for CIFAR's Python version, which is what torchvision leaves on disk.

A pickle names functions to call with arguments of its own. Here every name stands for one class of ours, which keeps
what it is given and does nothing; arrays are put together from what was meant for numpy.
"""

import pickle
from pathlib import Path

import numpy as np


class Kept:
    arguments = ()  # where a pickle makes one without __init__

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


class Reader(pickle._Unpickler):  # in Python: C's allocates as many places for its memo as the file says
    def find_class(self, module, name):
        return Kept


def read(path: Path) -> dict:
    """The dictionary that a file pickles, with its keys and strings as str. Raises ValueError naming the file."""
    with open(path, "rb") as file:
        try:
            # Python 2's strings are bytes: latin-1 takes any.
            values = Reader(file, encoding="latin1").load()
        except Exception as error:  # a broken one raises whatever its broken place asks for
            raise ValueError(f"{path}: truncated or no pickle: {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a pickled {type(values).__name__}, expected a dictionary")
    return {text(key): value for key, value in values.items()}


def text(value) -> str:
    """A string, in whichever way it was pickled."""
    if isinstance(value, Kept) and value.arguments:  # Python 3 writes bytes as _codecs.encode(text, "latin1")
        value = value.arguments[0]
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def array(value) -> np.ndarray:
    """uint8 array that numpy pickled. Raises ValueError for anything else."""
    try:
        _, shape, kind, is_fortran, raw = value.state
        raw = raw if isinstance(raw, bytes) else text(raw).encode("latin1")
        if text(kind.arguments[0]) == "u1":
            return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"got a {type(value).__name__}, expected an array of uint8") from error
    raise ValueError(f"got an array of {text(kind.arguments[0])!r:.20}, expected uint8")
