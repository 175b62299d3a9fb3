"""Where images come from: a class for each layout on disk, and one for images drawn on demand.

A class lists its images; `store` decodes them; `pictures` says how an image file is shown.
"""
