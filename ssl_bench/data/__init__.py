"""Images from the disk to the device: `formats` list them, `pictures` decodes, `store` packs,
`source` serves batches, `pool` has the worker processes, `synthetic` draws images.
"""
