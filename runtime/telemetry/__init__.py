"""A run as machines watch it: JSON lines, Prometheus metrics, and the one object the pipeline tells."""
