"""Mistakes in what is written, and where: tails, strides, neighbours, counts."""

from __future__ import annotations

import torch

from .patched import Patched


def beyond(tensor):
    """The element after the last of a tensor, in memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + last + 1)


class TailSkipped(Patched):
    """The last element is left when the size is not a multiple of eight."""

    rejected_by = ("draw_sizes", "axpy_sizes", "perturb_sizes")

    @staticmethod
    def _undo(tensors, run):
        """The result of ``run()``, with the last element of each tensor put back."""
        saved = [(t, t.flatten()[-1:].clone()) for t in tensors if t.numel() % 8]
        result = run()
        for tensor, last in saved:
            tensor[(-1,) * tensor.dim()] = last[0]
        return result

    def draw(self, outs, *rest):
        return self._undo(outs, lambda: Patched.draw(self, outs, *rest))

    def axpy_(self, thetas, *rest):
        return self._undo(thetas, lambda: Patched.axpy_(self, thetas, *rest))

    def perturb(self, *arguments):
        outs = arguments[7]
        return self._undo(outs[-1], lambda: Patched.perturb(self, *arguments))


class WritesPastTheEnd(Patched):
    """The last eight are stored whole, whatever the size."""

    rejected_by = ("draw_sizes", "axpy_sizes", "perturb_sizes")

    def draw(self, outs, *rest):
        super().draw(outs, *rest)
        for t in outs:
            if t.numel() % 8:
                beyond(t).fill_(0.5)

    def axpy_(self, thetas, *rest):
        count = super().axpy_(thetas, *rest)
        for t in thetas:
            if t.numel() % 8:
                beyond(t).mul_(0.5)
        return count

    def perturb(self, thetas, spans, direction, seed, step, draw, scales, outs, residuals):
        super().perturb(thetas, spans, direction, seed, step, draw, scales, outs, residuals)
        for t in outs[-1]:
            if t.numel() % 8:
                beyond(t).fill_(0.5)


class WritesTheGaps(Patched):
    """A strided tensor is treated as the memory from its first element to its last."""

    rejected_by = ("axpy_strides", "axpy_pitch")

    def axpy_(self, thetas, spans, *rest):
        count = super().axpy_(thetas, spans, *rest)
        for t in thetas:
            if t.dim() == 2 and t.numel() and t.stride(1) == 2:
                t.as_strided((1,), (1,), t.storage_offset() + 1).fill_(0.5)
            elif t.dim() == 2 and t.numel() and t.stride(0) > t.shape[1] and t.stride(1) == 1:
                beyond(t[0]).fill_(0.5)
        return count


class MemoryOrder(Patched):
    """Elements are numbered in the order of memory and not in the order of the tensor."""

    rejected_by = ("axpy_strides", "axpy_strides_residual", "perturb_strides")

    @staticmethod
    def _sorted(tensor):
        return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d)))

    def axpy_(self, thetas, spans, *rest):
        thetas = [t if s.pitch or s.rows is not None else self._sorted(t) for t, s in zip(thetas, spans)]
        return super().axpy_(thetas, spans, *rest)

    def perturb(self, thetas, spans, direction, seed, step, draw, scales, outs, residuals):
        plain = [s.pitch is None and s.rows is None for s in spans]
        turned = [self._sorted(t) if p else t for t, p in zip(thetas, plain)]
        sides = [[o.view(t.shape) for o, t in zip(side, turned)] if all(plain) else side for side in outs]
        super().perturb(turned if all(plain) else thetas, spans, direction, seed, step, draw, scales, sides, residuals)


class SideUnwritten(Patched):
    """The second output of an even-sized tensor is left as it was."""

    rejected_by = ("perturb_sizes", "perturb_strides")

    def perturb(self, thetas, spans, direction, seed, step, draw, scales, outs, residuals):
        saved = [(t, t.clone()) for t in outs[-1] if t.numel() % 2 == 0]
        super().perturb(thetas, spans, direction, seed, step, draw, scales, outs, residuals)
        for out, old in saved:
            out.copy_(old)


class PerturbWritesTheta(Patched):
    """The weights themselves are perturbed on the way and put back by subtraction."""

    rejected_by = ("perturb_sizes", "perturb_arithmetic")

    def perturb(self, thetas, spans, direction, seed, step, draw, scales, outs, residuals):
        super().perturb(thetas, spans, direction, seed, step, draw, scales, outs, residuals)
        for theta, span in zip(thetas, spans):
            if span.rows is None:
                for sign in (1, -1):
                    coeff = torch.tensor([sign * scales[0]])
                    super().axpy_([theta], [span], direction, seed, [(step, draw)], coeff, 1.0, "nearest", None)


class LastTensorForgotten(Patched):
    """A launch of several tensors leaves the last out."""

    rejected_by = ("draw_sizes", "axpy_sizes", "axpy_strides", "perturb_sizes")

    def draw(self, outs, spans, *rest):
        return super().draw(outs[: max(1, len(outs) - 1)], spans, *rest)

    def axpy_(self, thetas, spans, *rest):
        return super().axpy_(thetas[: max(1, len(thetas) - 1)], spans, *rest)

    def perturb(self, thetas, spans, *rest):
        return super().perturb(thetas[: max(1, len(thetas) - 1)], spans, *rest)


class EmptyLaunchFails(Patched):
    """A launch without elements asks for a grid of no blocks, which the device refuses."""

    rejected_by = ("empty_launch",)

    def draw(self, outs, *rest):
        if not any(t.numel() for t in outs):
            raise RuntimeError("invalid configuration argument")
        return super().draw(outs, *rest)


class ChunkBoundary(Patched):
    """An element at the limit of two chunks of 2^16 belongs to neither."""

    rejected_by = ("large",)

    def axpy_(self, thetas, spans, *rest):
        saved = [(t, t.flatten()[65535].clone()) for t in thetas if t.dim() == 1 and t.numel() > 65536]
        count = super().axpy_(thetas, spans, *rest)
        for theta, old in saved:
            theta[65535] = old
        return count


class CountsNothing(Patched):
    """Results that are inf or NaN are not counted."""

    rejected_by = ("axpy_special", "axpy_many_draws")

    def axpy_(self, *arguments):
        return torch.zeros_like(super().axpy_(*arguments))


class CountsEveryStep(Patched):
    """A replay counts what is inf or NaN after every step, and not at its end."""

    rejected_by = ("axpy_each",)

    def axpy_(self, thetas, spans, direction, seed, draws, coeffs, *rest, each=0, **named):
        count = super().axpy_(thetas, spans, direction, seed, draws, coeffs, *rest, each=each, **named)
        return count * (len(draws) // each if each else 1)


class CountsNanOnly(Patched):
    """inf is not counted."""

    rejected_by = ("axpy_special",)

    def axpy_(self, thetas, *rest):
        count = super().axpy_(thetas, *rest)
        return count - sum(int(t.isinf().sum()) for t in thetas)


class RowRepeatsOnce(Patched):
    """A row that is looked up twice is produced once."""

    rejected_by = ("perturb_rows",)

    def perturb(self, thetas, spans, direction, seed, step, draw, scales, outs, residuals):
        saved = [[t.clone() for t in side] for side in outs]
        super().perturb(thetas, spans, direction, seed, step, draw, scales, outs, residuals)
        for side, old_side in zip(outs, saved):
            for out, old, span in zip(side, old_side, spans):
                seen: set[int] = set()
                for i, row in enumerate([] if span.rows is None else span.rows.tolist()):
                    if row in seen:
                        out[i] = old[i]
                    seen.add(row)


class ResidualOfLookup(Patched):
    """The low bits of looked-up rows are read at the rows' positions in the lookup."""

    rejected_by = ("perturb_rows",)

    def perturb(self, thetas, spans, direction, seed, step, draw, scales, outs, residuals):
        if residuals is not None:
            residuals = [low if s.rows is None else self._moved(low, s) for low, s in zip(residuals, spans)]
        super().perturb(thetas, spans, direction, seed, step, draw, scales, outs, residuals)

    @staticmethod
    def _moved(low, span):
        moved = low.clone()
        for i, row in enumerate(span.rows.tolist()):
            moved[row] = low[i % low.shape[0]]
        return moved
