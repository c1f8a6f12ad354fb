"""Sources: where the images of a run come from."""
