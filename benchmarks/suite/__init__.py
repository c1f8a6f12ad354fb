"""`multisa bench`: every way to run a bundle on this machine, measured in one run."""
