"""Published methods, one file each: a method is a recipe that names its parts.

METHODS  name -> class, of every file in this folder; zokern exports them. A new file is found by itself"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from ..optimizer import ZerothOrder

if TYPE_CHECKING:  # for type checkers, which cannot look into a folder
    from .adamezo import AdaMeZO
    from .addax import Addax
    from .blockmezo import BlockMeZO
    from .bszo import BSZO
    from .conmezo import ConMeZO
    from .dizo import DiZO
    from .dpzo import DPZO
    from .eggroll import EGGROLL
    from .fgd import FGD
    from .fzoo import FZOO
    from .hizoo import HiZOO
    from .hybrid import Hybrid
    from .kerzoo import KerZOO
    from .lezo import LeZO
    from .lozo import LOZO
    from .mezo import MeZO
    from .mezogv import MeZOGV
    from .mezosvrg import MeZOSVRG
    from .pgap import PGAP
    from .rloo import RLOO
    from .sparse import SparseMeZO
    from .subzero import SubZero
    from .subzero_plus import SubZeroPlus
    from .tezo import TeZO
    from .zo_mopi import ZOMOPI
    from .zo_muon import ZOMuon
    from .zoadam import ZOAdam
    from .zoconservative import ZOConservative
    from .zomomentum import ZOMomentum
    from .zosignsgd import ZOSignSGD


def find() -> dict[str, type[ZerothOrder]]:
    """Returns the optimizers that the files of this folder define, by name."""
    found: dict[str, type[ZerothOrder]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for name, value in vars(module).items():
            if (
                isinstance(value, type)
                and issubclass(value, ZerothOrder)
                and value.__module__ == module.__name__
            ):
                found[name] = value
    return dict(sorted(found.items()))


METHODS: dict[str, type[ZerothOrder]] = find()
globals().update(METHODS)

__all__ = [
    "AdaMeZO", "Addax", "BSZO", "BlockMeZO", "ConMeZO", "DPZO", "DiZO", "EGGROLL", "FGD", "FZOO", "HiZOO",
    "Hybrid", "KerZOO", "LOZO", "LeZO", "MeZO", "MeZOGV", "MeZOSVRG", "PGAP", "RLOO", "SparseMeZO", "SubZero",
    "SubZeroPlus", "TeZO", "ZOAdam", "ZOConservative", "ZOMOPI", "ZOMomentum", "ZOMuon", "ZOSignSGD",
]  # fmt: skip
__all__ += [name for name in METHODS if name not in __all__]
