"""Images from the disk to the device.

`formats` list images, `pictures` decodes them, `store` packs them, `source` serves batches, `pool`
has the worker processes, `synthetic` draws images.
"""
