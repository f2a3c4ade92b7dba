"""The program of a rank of the backend `cuda` on the processor (see `vlmforge.backends.fake`)."""

from __future__ import annotations

import sys

from vlmforge.backends.fake import cuda_on_cpu
from vlmforge.backends.ranks.child import main
from vlmforge.backends.ranks.processes import Place

if __name__ == "__main__":
    with cuda_on_cpu():
        main(Place.parsed(sys.argv[1]))
