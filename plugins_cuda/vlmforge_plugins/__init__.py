"""CUDA kernels and the TensorRT plugins that launch them. They arrive with the TensorRT targets."""
