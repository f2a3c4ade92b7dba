"""`python -m vlmforge_builder` is `build-engine`."""

import sys

from vlmforge_builder.cli import main

sys.exit(main())
