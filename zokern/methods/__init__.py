"""Published methods, one file each: a method is a recipe that names its four parts."""

from .mezo import MeZO
from .subzero import SubZero

__all__ = ["MeZO", "SubZero"]
