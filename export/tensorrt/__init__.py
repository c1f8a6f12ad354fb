"""TensorRT plans from the graphs of a bundle; neither torch nor onnx is needed."""
