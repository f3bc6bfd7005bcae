"""Published methods, one file each: a method is a recipe that names its four parts."""

from .mezo import MeZO

__all__ = ["MeZO"]
