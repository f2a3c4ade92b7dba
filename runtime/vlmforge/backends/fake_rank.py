"""The program of a rank on the processor in a GPU's place (see `vlmforge.backends.fake`)."""

from __future__ import annotations

import sys

from vlmforge.backends.fake import cuda_on_cpu
from vlmforge.backends.fake_plans import plans_on_cpu
from vlmforge.backends.ranks.child import main
from vlmforge.backends.ranks.processes import Place

if __name__ == "__main__":
    with cuda_on_cpu(), plans_on_cpu("tensorrt"), plans_on_cpu("tensorrt_rtx"):
        main(Place.parsed(sys.argv[1]))
