"""`python -m zokern`."""

import sys

from .cli import main

sys.exit(main())
