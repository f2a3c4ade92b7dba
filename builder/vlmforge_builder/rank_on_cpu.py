"""The program of a rank that stands in for one of the target `cuda` while goldens are recorded."""

from __future__ import annotations

import sys

from vlmforge.backends.fake import InFloat32, cuda_on_cpu
from vlmforge.backends.ranks.child import main
from vlmforge.backends.ranks.processes import Place
from vlmforge_builder.widened_graphs import open_widened

if __name__ == "__main__":
    with cuda_on_cpu(graphs=InFloat32(open_widened)):
        main(Place.parsed(sys.argv[1]))
