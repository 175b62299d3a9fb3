"""Methods, a file for each paper.

`base` says what a method is, `layers` and `splits` have what several use; `probe` and `finetune`
learn from labels.
"""
