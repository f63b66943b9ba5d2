"""Bytes on disk: finding a checkpoint, and reading its configuration, weights, tokenizer and chat template."""
