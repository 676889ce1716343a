"""Megatron-style 3D-parallel pretraining for multi-token prediction (arXiv:2404.19737)."""

__version__ = "0.1.0"
