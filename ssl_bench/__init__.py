"""Self-supervised pretraining of image backbones, and numbers you can trust."""

__version__ = "0.1.0"
