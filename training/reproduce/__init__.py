"""The tables and figures of the paper, from any data set and any backbone."""
