"""`indistill export`: writes the student of a run as a timm folder, ONNX or torch.export."""
