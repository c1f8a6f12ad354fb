"""Shared by the operations and their CPU and CUDA implementations; imports no other part of kernels."""
