"""The kernels on an NVIDIA device: CUDA sources, their host schedules, and the binding to the driver.

The tests run every kernel and schedule by emulation on the CPU, and nvcc compiles them for every architecture
of `build.ARCHITECTURES`. No figure in this package was measured on a GPU.
"""
