"""The compiled kernels of this package, or what to do when they are not there."""

try:
    from multisa.kernels import _native as native
except ImportError as error:
    raise ImportError(
        "multisa.kernels: the compiled module _native is missing or does not fit this Python. Install the "
        "package again (pip install multisa, or pip install -e . in a clone); that needs a C++17 compiler, "
        "for example from apt-get install g++"
    ) from error

__all__ = ["native"]
