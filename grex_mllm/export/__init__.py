"""A model that leaves this package: for onnxruntime or as an exported torch program; what says whether it still answers the same."""
