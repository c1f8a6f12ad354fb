"""Backends: what runs a graph of a bundle, behind one protocol."""
