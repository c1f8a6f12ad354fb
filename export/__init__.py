"""From checkpoints to folded ONNX graphs and a bundle, with parity checked at once."""
