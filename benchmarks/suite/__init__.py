"""The measurement behind `multisa bench`: every way to run a bundle on this machine, in one run."""
