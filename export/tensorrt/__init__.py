"""Build TensorRT engines from a bundle's graphs; neither torch nor onnx is needed."""
