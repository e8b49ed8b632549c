"""The GPU: the operators on arrays in a GPU's memory, by CUDA kernels that CuPy compiles."""
