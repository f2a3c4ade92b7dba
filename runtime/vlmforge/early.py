"""What is imported from where few calls are under way: numpy.

CPython (3.11 and later) keeps its calls in blocks of 16 KiB. Where one ends, each further call
takes a block from the system and gives it back. Modules that import modules are deep in it, and
numpy calls much while it is imported: from there, a thousand blocks and 15 ms more.
"""

import numpy  # noqa: F401
