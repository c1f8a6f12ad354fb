"""Which engine runs a graph of a bundle."""

from multisa.runtime.bundle import Bundle
from multisa.runtime.engines.contract import Engine, GraphContract, graph_file
from multisa.runtime.engines.ort import OnnxRuntimeEngine


def open_engine(bundle: Bundle, contract: GraphContract, *, threads: int = 1) -> Engine:
    """Load the bundle's graph that keeps `contract`, from bytes that were verified as they were read."""
    return OnnxRuntimeEngine(bundle.read_file(graph_file(contract)), threads=threads, contract=contract)
