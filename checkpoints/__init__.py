"""Bytes on disk: finding a checkpoint, and reading its configuration, weights, tokenizer, template and head scores.

Only what imports in no time is here; take the rest from its module, e.g. `from checkpoints.weights import load_state`.
"""

from checkpoints.config import ModelConfig, RopeConfig, config_hash, load_config
from checkpoints.errors import CheckpointError
from checkpoints.importance import HeadImportance, read_all_importance, read_importance, write_importance

__all__ = [
    "CheckpointError",
    "HeadImportance",
    "ModelConfig",
    "RopeConfig",
    "config_hash",
    "load_config",
    "read_all_importance",
    "read_importance",
    "write_importance",
]
