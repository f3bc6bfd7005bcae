"""The most memory that tensors held at once, counted where torch makes them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts the bytes of storages that operations return, from their first sight to their end.

    most  the largest sum so far; storages that were there before do not count"""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in given and key not in self.held:
                    self.held[key] = weakref.finalize(storage, self._free, key, size)
                    self.now += size
                    self.most = max(self.most, self.now)
        return found

    def _free(self, key: int, size: int) -> None:
        self.held.pop(key, None)
        self.now -= size
