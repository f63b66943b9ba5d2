"""What one launch computes: plain functions over tensors, usable without the rest of the project."""
