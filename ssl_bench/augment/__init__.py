"""Views of images: `draws` has the random numbers, `ops` transforms whole batches, `views` composes
the ops.
"""
