"""The kernels on an NVIDIA GPU: host schedules of the CUDA sources, and the binding to the driver.

Modules here import `multisa.kernels.common` and each other, never the operations above them. The tests run
every kernel and schedule on the CPU, and nvcc compiles them for every architecture of `build.ARCHITECTURES`.
"""
