"""Measurements of a network.

`passes` over images, their `features`, which `labels` count, `neighbours`, the
`calibration` of probabilities, the `health` of embeddings, the `selection` of images to label.
"""
