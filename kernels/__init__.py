"""The two places where plain PyTorch is not enough: attention over documents, and the loss."""
