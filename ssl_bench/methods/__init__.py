"""A paper a file; `base` says what a method is, `layers` what several use; `probe` and `finetune`
learn from labels.
"""
