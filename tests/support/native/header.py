"""The C++ headers of the stream as NumPy functions:
compiles header.cpp with g++ and calls it through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
CXX = os.environ.get("CXX", "g++")
DIRECTIONS = {"normal": 0, "rademacher": 1}


def why_off() -> str | None:
    """None where the tools can be compiled, else the reason."""
    return None if shutil.which(CXX) else f"no C++ compiler {CXX!r} on PATH; install g++ or set CXX"


def compile_tool(source: str, target: Path, *flags: str) -> Path:
    """A source of this folder to a program or shared library, without contraction."""
    command = [
        CXX,
        "-std=c++17",
        "-ffp-contract=off",
        f"-I{CSRC}",
        *flags,
        str(HERE / source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    return target


class Header:
    """csrc/zo/*.h at one optimisation level."""

    def __init__(self, *flags: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = compile_tool("header.cpp", Path(folder) / "header.so", "-shared", "-fPIC", *flags)
            self._library = ctypes.CDLL(str(path))

    def _call(self, name: str, *arguments) -> None:
        def plain(x):
            return ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else x

        getattr(self._library, name)(*map(plain, arguments))

    def philox4x32(self, counters: np.ndarray, key: tuple[int, int], rounds: int) -> np.ndarray:
        counters, words = np.ascontiguousarray(counters, np.uint32), np.empty((len(counters), 4), np.uint32)
        self._call(
            "words_of", counters, ctypes.c_int64(len(counters)), np.array(key, np.uint32), rounds, words
        )
        return words

    def normal(self, words: np.ndarray) -> np.ndarray:
        words, values = np.ascontiguousarray(words, np.uint32), np.empty((words.size, 2), np.float32)
        self._call("normal_pairs", words, ctypes.c_int64(words.size), values)
        return values

    def draw(
        self, direction: str, seed: int, who: int, step: int, draw: int, first: int, count: int
    ) -> np.ndarray:
        values = np.empty(count, np.float32)
        words = (ctypes.c_uint32(w) for w in (who, step, draw))
        which = DIRECTIONS[direction]
        self._call(
            "values_of",
            which,
            ctypes.c_uint64(seed),
            *words,
            ctypes.c_uint64(first),
            ctypes.c_int64(count),
            values,
        )
        return values

    def value(self, direction: str, seed: int, who: int, step: int, draw: int, index: int) -> np.ndarray:
        value = np.empty(1, np.float32)
        words = (ctypes.c_uint32(w) for w in (who, step, draw))
        self._call(
            "value_of", DIRECTIONS[direction], ctypes.c_uint64(seed), *words, ctypes.c_uint64(index), value
        )
        return value

    def rounding_bits(self, seed: int, who: int, step: int, first: int, count: int) -> np.ndarray:
        bits = np.empty(count, np.uint32)
        words = ctypes.c_uint32(who), ctypes.c_uint32(step), ctypes.c_uint64(first), ctypes.c_int64(count)
        self._call("rounding_bits_of", ctypes.c_uint64(seed), *words, bits)
        return bits

    def rounded(self, values: np.ndarray, random: np.ndarray) -> np.ndarray:
        """uint16[n, 6]: bfloat16 nearest, stochastic,
        float16 nearest, stochastic, high and low half of the split."""
        values, random = np.ascontiguousarray(values, np.float32), np.ascontiguousarray(random, np.uint32)
        halves = np.empty((values.size, 6), np.uint16)
        self._call("rounded", values, random, ctypes.c_int64(values.size), halves)
        return halves

    def joined(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        values = np.empty(high.size, np.float32)
        high, low = np.ascontiguousarray(high, np.uint16), np.ascontiguousarray(low, np.int16)
        self._call("joined", high, low, ctypes.c_int64(high.size), values)
        return values

    def widened(self, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        halves = np.ascontiguousarray(halves, np.uint16)
        bfloat16, float16 = np.empty(halves.size, np.float32), np.empty(halves.size, np.float32)
        self._call("widened", halves, ctypes.c_int64(halves.size), bfloat16, float16)
        return bfloat16, float16


@functools.cache
def header(*flags: str) -> Header:
    return Header(*flags)
