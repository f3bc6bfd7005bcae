"""What is aimed for on an H200 in bfloat16, as data: which measured figure must reach what. The page opens
with it."""

from __future__ import annotations

from ..goals import Goal

GOALS = (
    Goal("axpy_ cuda / copy", "axpy_ Normal K=1, CUDA, share of the measured copy bandwidth", 90, "%"),
    Goal("axpy_ triton / copy", "the same, Triton", 85, "%"),
    Goal("axpy_ cuda / eager", "axpy_ over the eager MeZO perturb", 5),
    Goal("axpy_ cuda / compile", "axpy_ over torch.compile of it", 1.5),
    Goal("perturb pair cuda / copy", "perturb both signs, share of copy", 85, "%"),
    Goal("K=8 cuda, passes / one", "K=8 draws in one pass over 8 passes", 1.25),
    Goal("lowrank_ cuda, least / copy",
        "lowrank_ r = 8..128 at 4096x4096 and 4096x14336, least share of copy", 80, "%"),
    Goal("lowrank_ cuda, least / addmm_", "the same over addmm_, least", 1.0),
    Goal("lowrank_ cuda, median / addmm_", "the same over addmm_, median", 1.2),
    Goal("MeZO paired Llama-1B 4x128 / forwards",
        "whole dense step over its two forwards, Llama-1B 4x128, paired", 1.6, at_least=False),
    Goal("MeZO paired, graph Llama-1B 4x128 / graph of forwards",
        "the same in a graph, over two forwards in one", 1.1, at_least=False),
    Goal("MeZO master Llama-1B 16x256 / forwards", "the same, Llama-1B 16x256, master", 1.12, at_least=False),
    Goal("MeZO master, graph Llama-1B 16x256 / graph of forwards", "the same in a graph",
        1.05, at_least=False),
    Goal("MeZO scratch OPT-1.3B 16x256 / forwards", "the same, OPT-1.3B 16x256, scratch",
        1.1, at_least=False),
    Goal("MeZO scratch OPT-1.3B 1x16 / forwards", "the same, 1x16", 1.6, at_least=False),
    Goal("memory of a step, MeZO scratch OPT-1.3B 16x256",
        "extra peak memory of that step over inference: both sides of the largest matrix", 440, "MB", False),
)  # fmt: skip
