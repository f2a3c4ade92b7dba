"""Compiling graphs with TensorRT and TensorRT-RTX, in a process of their own."""
