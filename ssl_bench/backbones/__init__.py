"""Feature extractors: images (B, 3, H, W) -> features (B, dim); `.dim` is the features' width.

A backbone that doesn't take images of every size says why by `.refuses(size)`, and may say by
`.instead(key, size)` what to type for it. One that was cut from a network with a classifier may
have `.classifier_keys()`: the beginnings of the names that the classifier's tensors have in a state
dict of the whole network.
"""
