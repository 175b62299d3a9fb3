"""Views of images.

`draws` has the random numbers, `ops` the transforms of whole batches, `views` composes them.
"""
