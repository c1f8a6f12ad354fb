"""What benchmarks/gpu.sh does, step by step.

start, main, settings, steps, runner, summary and look run before anything is installed: with the standard
library, and modules of multisa that need no more.
"""
