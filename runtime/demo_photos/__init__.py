"""Photographs that may be shipped, for `multisa demo`."""
