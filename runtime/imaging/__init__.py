"""Decoding of images and encoding of masks: the only package that reads or writes image files."""
