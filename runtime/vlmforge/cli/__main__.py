"""`python -m vlmforge.cli` is `vlmforge`."""

import sys

from vlmforge.cli import main

sys.exit(main())
