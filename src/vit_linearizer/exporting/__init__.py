"""A model as files that other tools open (timm, ONNX, ``torch.export``), each compared with PyTorch after writing."""
