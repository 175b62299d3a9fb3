"""What the patches of a transformer show, as numbers that can be looked at."""

import torch
from torch import Tensor


@torch.no_grad()
def principal_colours(patches: Tensor) -> Tensor:
    """Patch tokens (N, L, D) of N images -> (N, L, 3) between 0 and 1, alike where tokens are.

    Their first three principal components, of all images together (DINOv2, arXiv:2304.07193,
    figure 1), each from its 2nd to its 98th hundredth.
    """
    flat = patches.flatten(0, 1).float().cpu()
    centred = flat - flat.mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # the largest come last
    components = centred @ vectors[:, -3:].flip(1)
    # An eigenvector's sign is any: the longer tail of each is bright, in every picture of a run.
    components = components * components.pow(3).sum(dim=0).sign()
    low, high = components.quantile(torch.tensor([0.02, 0.98]), dim=0).unbind(0)
    shares = (components - low) / (high - low).clamp(min=1e-12)
    return shares.clamp(0, 1).unflatten(0, patches.shape[:2])


@torch.no_grad()
def brightness(attention: Tensor) -> Tensor:
    """Attention (N, L) -> (N, L) between 0 and 1: each image's from its least to its most."""
    low, high = attention.amin(dim=1, keepdim=True), attention.amax(dim=1, keepdim=True)
    return (attention - low) / (high - low).clamp(min=1e-12)
