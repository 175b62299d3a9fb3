"""Where images come from: one class a layout on disk (or none). A class lists its images; `store`
decodes them.

`pictures` says what becomes of an image file.
"""
