"""Decoding images and encoding masks: the only place where image files are read or written."""
