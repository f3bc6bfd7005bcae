"""`python -m examples.demo`, from the root of a checkout."""

import sys

from . import main

sys.exit(main())
