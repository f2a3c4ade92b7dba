"""From a checkpoint to an engine directory: `build-engine`."""

from vlmforge import env

# Before any module of a build imports a library that would report to its maker.
env.refuse_telemetry()
