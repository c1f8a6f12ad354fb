"""The labelling chain that stays on an NVIDIA GPU from the upload of an image to the download of its mask."""
