"""Mistakes in what is written, and where: tails, strides, neighbours, counts."""

from __future__ import annotations

import torch

from zokern.backends import Batch, Terms

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

    def draw(self, batch, noise):
        return self._undo(batch.tensors, lambda: Patched.draw(self, batch, noise))

    def axpy_(self, batch, *rest):
        return self._undo(batch.tensors, lambda: Patched.axpy_(self, batch, *rest))

    def perturb(self, *arguments):
        return self._undo(arguments[-1][-1], lambda: Patched.perturb(self, *arguments))


class WritesPastTheEnd(Patched):
    """The last eight are stored whole, whatever the size."""

    rejected_by = ("draw_sizes", "axpy_sizes", "perturb_sizes")

    def draw(self, batch, noise):
        super().draw(batch, noise)
        for t in batch.tensors:
            if t.numel() % 8:
                beyond(t).fill_(0.5)

    def axpy_(self, batch, *rest):
        count = super().axpy_(batch, *rest)
        for t in batch.tensors:
            if t.numel() % 8:
                beyond(t).mul_(0.5)
        return count

    def perturb(self, batch, noise, scales, outs):
        super().perturb(batch, noise, scales, outs)
        for t in outs[-1]:
            if t.numel() % 8:
                beyond(t).fill_(0.5)


class WritesTheGaps(Patched):
    """A strided tensor is treated as the memory from its first element to its last."""

    rejected_by = ("axpy_strides", "axpy_pitch")

    def axpy_(self, batch, *rest):
        count = super().axpy_(batch, *rest)
        for t in batch.tensors:
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

    def axpy_(self, batch, *rest):
        pairs = zip(batch.tensors, batch.spans)
        thetas = [t if s.pitch or s.rows is not None else self._sorted(t) for t, s in pairs]
        return super().axpy_(batch._replace(tensors=thetas), *rest)

    def perturb(self, batch, noise, scales, outs):
        if all(s.pitch is None and s.rows is None for s in batch.spans):
            batch = batch._replace(tensors=[self._sorted(t) for t in batch.tensors])
            outs = [[o.view(t.shape) for o, t in zip(side, batch.tensors)] for side in outs]
        super().perturb(batch, noise, scales, outs)


class SideUnwritten(Patched):
    """The second output of an even-sized tensor is left as it was."""

    rejected_by = ("perturb_sizes", "perturb_strides")

    def perturb(self, batch, noise, scales, outs):
        saved = [(t, t.clone()) for t in outs[-1] if t.numel() % 2 == 0]
        super().perturb(batch, noise, scales, outs)
        for out, old in saved:
            out.copy_(old)


class PerturbWritesTheta(Patched):
    """The weights themselves are perturbed on the way and put back by subtraction."""

    rejected_by = ("perturb_sizes", "perturb_arithmetic")

    def perturb(self, batch, noise, scales, outs):
        super().perturb(batch, noise, scales, outs)
        for theta, span in zip(batch.tensors, batch.spans):
            if span.rows is None:
                for sign in (1, -1):
                    super().axpy_(Batch([theta], [span]), noise, Terms(torch.tensor([sign * scales[0]])))


class LastTensorForgotten(Patched):
    """A launch of several tensors leaves the last out."""

    rejected_by = ("draw_sizes", "axpy_sizes", "axpy_strides", "perturb_sizes")

    @staticmethod
    def _shorter(batch):
        return batch._replace(tensors=batch.tensors[: max(1, len(batch.tensors) - 1)])

    def draw(self, batch, *rest):
        return super().draw(self._shorter(batch), *rest)

    def axpy_(self, batch, *rest):
        return super().axpy_(self._shorter(batch), *rest)

    def perturb(self, batch, *rest):
        return super().perturb(self._shorter(batch), *rest)


class EmptyLaunchFails(Patched):
    """A launch without elements asks for a grid of no blocks, which the device refuses."""

    rejected_by = ("empty_launch",)

    def draw(self, batch, noise):
        if not any(t.numel() for t in batch.tensors):
            raise RuntimeError("invalid configuration argument")
        return super().draw(batch, noise)


class ChunkBoundary(Patched):
    """An element at the limit of two chunks of 2^16 belongs to neither."""

    rejected_by = ("large",)

    def axpy_(self, batch, *rest):
        saved = [(t, t.flatten()[65535].clone()) for t in batch.tensors if t.dim() == 1 and t.numel() > 65536]
        count = super().axpy_(batch, *rest)
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

    def axpy_(self, batch, noise, terms):
        count = super().axpy_(batch, noise, terms)
        return count * (len(noise.draws) // terms.each if terms.each else 1)


class CountsNanOnly(Patched):
    """inf is not counted."""

    rejected_by = ("axpy_special",)

    def axpy_(self, batch, *rest):
        count = super().axpy_(batch, *rest)
        return count - sum(int(t.isinf().sum()) for t in batch.tensors)


class RowRepeatsOnce(Patched):
    """A row that is looked up twice is produced once."""

    rejected_by = ("perturb_rows",)

    def perturb(self, batch, noise, scales, outs):
        saved = [[t.clone() for t in side] for side in outs]
        super().perturb(batch, noise, scales, outs)
        for side, old_side in zip(outs, saved):
            for out, old, span in zip(side, old_side, batch.spans):
                seen: set[int] = set()
                for i, row in enumerate([] if span.rows is None else span.rows.tolist()):
                    if row in seen:
                        out[i] = old[i]
                    seen.add(row)


class ResidualOfLookup(Patched):
    """The low bits of looked-up rows are read at the rows' positions in the lookup."""

    rejected_by = ("perturb_rows",)

    def perturb(self, batch, noise, scales, outs):
        if batch.residuals is not None:
            pairs = zip(batch.residuals, batch.spans)
            batch = batch._replace(
                residuals=[low if s.rows is None else self._moved(low, s) for low, s in pairs]
            )
        super().perturb(batch, noise, scales, outs)

    @staticmethod
    def _moved(low, span):
        moved = low.clone()
        for i, row in enumerate(span.rows.tolist()):
            moved[row] = low[i % low.shape[0]]
        return moved
