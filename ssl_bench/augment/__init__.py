"""Views of images: `draws` says what is random, `ops` are transforms of whole batches, `views`
composes them.
"""
