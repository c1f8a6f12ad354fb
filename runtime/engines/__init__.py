"""Engines: what runs the graphs of a bundle, behind one protocol."""
