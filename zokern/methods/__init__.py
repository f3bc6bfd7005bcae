"""Published methods, one file each: a method is a recipe that names its four parts."""

from .fzoo import FZOO
from .lozo import LOZO
from .mezo import MeZO
from .pgap import PGAP
from .subzero import SubZero
from .tezo import TeZO

__all__ = ["FZOO", "LOZO", "MeZO", "PGAP", "SubZero", "TeZO"]
