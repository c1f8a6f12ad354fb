"""PyTorch: the networks, the data readers and every training stage of the pipeline."""
