"""One file per model family; the file's name is Hugging Face's `model_type`."""
