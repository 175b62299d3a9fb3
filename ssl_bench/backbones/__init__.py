"""Feature extractors: images (B, 3, H, W) -> features (B, dim), with the width of the features as
`.dim`.

One that doesn't take images of every size says why by `.refuses(size)`. `.classifier_keys()`, where
a backbone has it: what the names of the classifier's tensors begin with in a state dict of the
whole network.
"""
