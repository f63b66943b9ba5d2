"""What one module means: the parts of a model and of its KV cache, each usable alone."""
