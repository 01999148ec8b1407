"""Building a network from an ONNX file: its nodes become a blueprint and a state, a layer for each node."""
