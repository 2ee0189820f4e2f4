"""Turn a checkpoint into a bundle of ONNX files, and prove that it computes the same."""
