"""Executors: what processes the shards of a job, in this process, in several, or on a Ray cluster."""
