"""The neural networks, one file each."""
