"""Bundles carried by the package, one folder each."""
