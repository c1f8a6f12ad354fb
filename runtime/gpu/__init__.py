"""Labelling on an NVIDIA GPU, from the upload of an image to the download of its mask."""
