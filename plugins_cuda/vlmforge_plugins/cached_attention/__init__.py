"""`CachedAttention`: rotary embedding, paged KV write and causal attention, in CUDA C++.

`config` says which kernels exist, `compile` makes them, `plan` chooses what to launch from
host-side numbers alone, and `launcher` launches it on a stream. `kernels/` includes no header of
a framework.
"""
